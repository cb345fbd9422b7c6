"""What is stored in which type, and what autocast is asked for: Paddle's CPU build cannot compute with these types."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.compose import CONF_FOLDER, compose_config
from blip2x.config.run import PrecisionName
from blip2x.losses.itc import similarities
from blip2x.models.precision import FLOAT32_OPERATIONS, storage_types, store_in
from blip2x.models.weights.checkpoint import fill, stored_parameter
from blip2x.registry import LANGUAGE_MODELS, VISION_ENCODERS

MODELS = sorted(path.stem for path in (CONF_FOLDER / "model").glob("*.yaml") if path.stem != "auto")
LOW_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SMALL = [f"model.{part}.{size}" for part in ("vision", "language") for size in ("width=24", "mlp_width=32")]


def type_of(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).removeprefix("paddle.")


@pytest.mark.parametrize("name", MODELS)
def test_frozen_towers_are_low_and_t5_is_never_float16(name):
    cfg = compose_config([f"model={name}"]).model
    for precision in PrecisionName:
        types, low = storage_types(precision, cfg), LOW_TYPES[precision.value]
        reader = "bfloat16" if "t5" in name and low == "float16" else low
        assert (types.pop("vision"), types.pop("language")) == (low, reader)
        assert set(types) == {"ln_vision", "qformer", "vision_proj", "text_proj", "itm_head", "temp", "language_proj"}
        assert set(types.values()) == {"float32"}


def test_what_is_trained_keeps_float32():
    cfg = compose_config(["model=tiny_t5", "model.vision.frozen=false", "model.language.frozen=false"]).model
    for precision in PrecisionName:
        assert set(storage_types(precision, cfg).values()) == {"float32"}


def build(kind: str) -> nn.Layer:
    option = {"eva_vit": "tiny_opt", "clip_vit": "tiny_opt", "opt": "tiny_opt", "t5": "tiny_t5"}[kind]
    vision = ["model/vision=clip_vit_l", "model.vision.num_heads=4", "model.vision.depth=1"] if kind == "clip_vit" else []
    cfg = compose_config([f"model={option}", *vision, *SMALL]).model
    return VISION_ENCODERS.get(kind)(cfg.vision) if "vit" in kind else LANGUAGE_MODELS.get(kind)(cfg.language, 30)


# what stays in float32, beside norms
BEGIN = {"eva_vit": {"embeddings.class_token", "embeddings.positions"}, "opt": set(), "t5": set()}
BEGIN["clip_vit"] = BEGIN["eva_vit"]


@pytest.mark.parametrize("kind", BEGIN)
def test_matrices_are_low_and_norms_are_not_and_numbers_arrive_in_both(kind):
    paddle.seed(0)
    whole = build(kind)
    with paddle.LazyGuard():
        model = build(kind)
    store_in(model, "bfloat16")
    assert not any(parameter._is_initialized() for parameter in model.parameters())
    expected = dict(whole.named_parameters())
    fill(model, {name: stored_parameter(name, tensor) for name, tensor in expected.items()}, "here")
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    exact = {name for name, parameter in found.items() if type_of(parameter) == "float32"}
    assert exact - BEGIN[kind] == {name for name in found if "norm" in name} and BEGIN[kind] <= exact
    for name, parameter in found.items():
        assert type_of(parameter) == ("float32" if name in exact else "bfloat16"), name
        rounded = parameter.astype("float32").numpy()
        np.testing.assert_allclose(rounded, expected[name].numpy(), rtol=0 if name in exact else 2**-8, err_msg=name)


def test_a_shared_matrix_stays_one_and_keeps_what_was_said_about_it():
    with paddle.LazyGuard():
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    first.weight.share, first.weight.stop_gradient = "half", True
    store_in(nn.LayerList([first, second]), "float16")
    assert first.weight is second.weight and first.weight.share == "half" and first.weight.stop_gradient
    assert type_of(first.weight) == type_of(second.bias) == "float16" and not second.bias.stop_gradient
    second.bias.initialize()  # as the layer said
    assert not second.bias.astype("float32").numpy().any()


@pytest.fixture
def asked(monkeypatch):
    """`asked(dtype)` -> what autocast is asked for from now on, as inside autocast to `dtype`."""
    requests = []
    state = {"on": False, "dtype": "float16"}

    @contextmanager
    def record(**options):
        requests.append(options)
        before = dict(state)
        state.update(on=options.get("enable", True), dtype=options.get("dtype", "float16"))
        yield
        state.update(before)

    def inside(dtype: str) -> list[dict]:
        state.update(on=True, dtype=dtype)
        return requests

    monkeypatch.setattr(paddle.amp, "auto_cast", record)
    monkeypatch.setattr(paddle, "is_autocast_enabled", lambda: state["on"])
    monkeypatch.setattr(paddle, "get_autocast_dtype", lambda: state["dtype"])
    return inside


BFLOAT16 = {"level": "O1", "dtype": "bfloat16", "custom_black_list": FLOAT32_OPERATIONS}
LEAVE = {"enable": False}
IDS = paddle.to_tensor([[3, 4]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_t5_computes_in_bfloat16_and_looks_up_outside_of_autocast(dtype, asked):
    model, requests = build("t5"), asked(dtype)
    model.eval()
    ones, enters = paddle.ones_like(IDS), [BFLOAT16] if dtype == "float16" else []
    embeds = model.embed(IDS)
    assert requests == [LEAVE]
    del requests[:]
    model(embeds, ones, IDS, ones)
    assert requests == [*enters, LEAVE, LEAVE, LEAVE]  # both position biases and the decoder's words
    del requests[:]
    _, state = model.prefill((embeds, ones))
    assert requests == [*enters, LEAVE, LEAVE, LEAVE]
    del requests[:]
    model.step(paddle.to_tensor([3]), state)
    assert requests == [*enters, LEAVE, LEAVE]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_t5s_norm_whose_weight_is_float32_keeps_the_type_of_what_it_normalises(dtype):
    norm, hidden = build("t5").encoder.final_layer_norm, paddle.full([2, 24], 3.0, dtype=dtype)
    assert type_of(norm.weight) == "float32" and type_of(norm(hidden)) == dtype
    np.testing.assert_allclose(norm(hidden).astype("float32").numpy(), 1, rtol=2**-8)


def test_opt_computes_as_it_is_told_and_looks_words_and_positions_up_outside_of_autocast(asked):
    model, requests = build("opt"), asked("float16")
    model.eval()
    model(model.embed(IDS), paddle.ones_like(IDS))
    assert requests == [LEAVE, LEAVE]


def test_outside_of_autocast_nothing_is_asked_for(asked):
    model = build("t5")
    model.prefill((model.embed(IDS), paddle.ones_like(IDS)))
    requests = asked("float16")
    assert requests == []


def test_similarities_leave_autocast_and_are_float32(asked):
    features = [paddle.ones([2, 3, 4]), paddle.ones([2, 4]), paddle.ones([2, 3, 4]), paddle.ones([2, 4])]
    requests = asked("bfloat16")
    scores = similarities(*(feature.astype("bfloat16") for feature in features), paddle.ones([1]))
    assert requests == [LEAVE] and all(type_of(score) == "float32" for score in scores)
    assert scores[0].numpy().tolist() == [[4.0, 4.0], [4.0, 4.0]]
