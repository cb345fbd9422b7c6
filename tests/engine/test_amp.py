"""Mixed precision without its arithmetic: what is refused, asked for, scaled and said."""

from __future__ import annotations

import functools
import json
import math

import paddle
import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.config.run import PrecisionConfig, PrecisionName
from blip2x.engine.amp import LossScale, autocast, check_precision, dtype_map, full_precision
from blip2x.errors import UserError
from blip2x.models.precision import FLOAT32_OPERATIONS


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(*types)`: what paddle says that GPUs compute in."""

    def has(*types: str) -> None:
        for name in ("bfloat16", "float16"):
            monkeypatch.setattr(paddle.amp, f"is_{name}_supported", lambda device, name=name: name in types)

    return has


@functools.cache
def config(name: str, *overrides: str):
    return compose_config([f"precision={name}", "task=caption", "dataset=custom", "dataset.images=x", *overrides])


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_on_a_cpu_a_low_precision_is_one_sentence_and_never_float32(name, dtype):
    sentence = rf"^precision={name} needs a GPU: paddle's CPU build has no {dtype} arithmetic; use precision=fp32"
    with pytest.raises(UserError, match=sentence):
        check_precision(config(name), "cpu")
    with pytest.raises(UserError, match=sentence):
        autocast(config(name).precision, "cpu")
    with pytest.raises(RuntimeError, match=dtype):  # why; where this begins to work the refusal can go
        paddle.matmul(paddle.ones([2, 2]).astype(dtype), paddle.ones([2, 2]).astype(dtype))


def test_float32_is_never_refused():
    check_precision(config("fp32", "parallelism=sharding3"), "cpu")


def test_gpus_without_the_type(gpu):
    gpu("float16")
    with pytest.raises(UserError, match=r"^precision=bf16, but gpu:1 has no bfloat16 arithmetic .* use precision=fp16"):
        check_precision(config("bf16"), "gpu:1")
    check_precision(config("fp16"), "gpu:1")
    with pytest.raises(UserError, match=r"^precision=fp16 computes T5 in bfloat16.*gpu:0 has no bfloat16"):
        check_precision(config("fp16", "model=flant5xl"), "gpu:0")
    check_precision(config("fp16", "model=flant5xl", "task=pretrain_stage1"), "gpu:0")  # has no T5
    gpu()
    with pytest.raises(UserError, match=r"^precision=fp16, but gpu:0 has no float16 arithmetic"):
        check_precision(config("fp16"), "gpu:0")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_scale_cannot_be_divided_out_of_sliced_gradients(stage, gpu):
    gpu("float16", "bfloat16")
    check_precision(config("bf16", f"parallelism=sharding{stage}"), "gpu:0")
    if stage < 3:
        check_precision(config("fp16", f"parallelism=sharding{stage}"), "gpu:0")
    else:
        with pytest.raises(UserError, match=r"^precision=fp16 with parallelism.sharding_stage=3: .*precision=bf16"):
            check_precision(config("fp16", f"parallelism=sharding{stage}"), "gpu:0")


@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_what_autocast_is_asked_for(name, dtype, monkeypatch):
    monkeypatch.setattr(paddle.amp, "auto_cast", lambda **options: options)
    asked = {"level": "O1", "dtype": dtype, "custom_black_list": FLOAT32_OPERATIONS}
    assert autocast(config(name).precision, "gpu:0") == asked
    assert {"layer_norm", "softmax", "log_softmax", "softmax_with_cross_entropy", "p_norm"} <= set(FLOAT32_OPERATIONS)
    monkeypatch.setattr(paddle, "is_autocast_enabled", lambda: True)
    assert full_precision() == {"enable": False}


def test_float32_enters_no_autocast(monkeypatch):
    monkeypatch.setattr(paddle.amp, "auto_cast", None)
    for device in ("cpu", "gpu:0"):
        with autocast(config("fp32").precision, device), full_precision():
            pass


def scale(name: PrecisionName = PrecisionName.fp16, start: float = 8.0, steps: int = 3) -> LossScale:
    return LossScale(PrecisionConfig(name=name, loss_scale=start, loss_scale_steps=steps))


def values(made: LossScale, finite: str) -> list[float]:
    """The scale after each step, of which "1" were finite."""
    found = []
    for letter in finite:
        made.update(letter == "1")
        found.append(made.value)
    return found


def test_the_scale_is_halved_at_once_and_doubled_after_good_steps_in_a_row():
    assert values(scale(), "1111110110111") == [8, 8, 16, 16, 16, 32, 16, 16, 16, 8, 8, 8, 16]


def test_the_scale_stays_in_its_bounds():
    assert values(scale(start=4.0), "0000") == [2, 1, 1, 1]
    assert values(scale(start=2.0**23, steps=1), "111") == [2**24] * 3


def test_the_scale_goes_on_where_its_state_was_taken():
    first, second = scale(), scale(start=64.0)
    values(first, "11111")
    second.set_state(json.loads(json.dumps(first.state())))
    assert values(first, "1011") == values(second, "1011") == [32, 16, 16, 16]


@pytest.mark.parametrize("name", [PrecisionName.fp32, PrecisionName.bf16])
def test_only_float16_is_scaled(name):
    made = scale(name, steps=1)
    made.set_state(scale().state())  # a run that goes on in another precision
    assert values(made, "1010") == [1, 1, 1, 1]


def test_scaled_gradients_divided_again_are_the_gradients_and_an_overflow_shows():
    """As the loop does it; a power of two changes no digit of a float32."""
    weight = paddle.to_tensor([0.5, -3.0], stop_gradient=False)
    (weight**3).sum().backward()
    expected, made = weight.grad.numpy(), scale(start=65536.0)
    weight.clear_gradient(set_to_zero=False)
    ((weight**3).sum() * made.value).backward()
    with paddle.no_grad():  # in place
        weight.grad.scale_(1 / made.value)
    assert weight.grad.numpy().tolist() == expected.tolist()
    ((weight**3).sum() * 3e38).backward()
    norm = float((weight.grad**2).sum().sqrt())
    made.update(math.isfinite(norm))
    assert made.value == 32768


def test_numbers_of_the_scale_are_checked():
    for override in ("precision.loss_scale=0", "precision.loss_scale=inf", "precision.loss_scale_steps=0"):
        with pytest.raises(UserError, match=rf"^{override.partition('=')[0]} must be "):
            compose_config([override])


def test_the_map_of_types_says_no_more_than_it_must():
    def block(dtype: str) -> nn.Layer:
        return nn.LayerDict({"norm": nn.LayerNorm(2), "fc": nn.Linear(2, 2).to(dtype=dtype)})

    tower = nn.LayerDict({"blocks": nn.LayerList([block("bfloat16"), block("bfloat16")])})
    mixed = nn.LayerList([nn.Linear(2, 2), nn.Linear(2, 2).to(dtype="float16")])
    model = nn.LayerDict({"vision": tower, "vision_proj": nn.Linear(2, 2), "heads": mixed})
    model.temp = model.create_parameter([1])
    assert dtype_map(model) == {
        "temp": "float32",
        "vision.blocks.*.norm": "float32",
        "vision.blocks.*.fc": "bfloat16",
        "vision_proj": "float32",
        "heads.*.weight": "float16 and float32",
        "heads.*.bias": "float16 and float32",
    }
