"""A training step with low-precision storage, through all casts, on a CPU.

Inside autocast Paddle's own rule makes everything float32 where tensors lie on a CPU, but its Python part refuses to switch
autocast on there. Without that refusal a step runs with stored numbers that are rounded and arithmetic that is not: enough to
find parts whose types do not fit each other, not to see what half-precision products do.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import numpy as np
import paddle
import pytest
from paddle.amp.auto_cast import _update_list
from paddle.base import core
from paddle.base.framework import _dygraph_tracer

from blip2x.config.compose import compose_config
from blip2x.engine.amp import autocast, full_precision
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2, join_prefix
from blip2x.models.freeze import freeze, set_eval_mode, set_train_mode
from blip2x.models.precision import storage_types, store_in
from blip2x.models.weights.checkpoint import fill, stored_parameter
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.parallel.context import Context

VOCABULARY, ROWS, LENGTH = 40, 3, 6
SMALL = [f"model.{part}.{size}" for part in ("vision", "qformer", "language") for size in ("width=48", "mlp_width=64")]
# Of all gradients together, by the coarsest type stored. Rounding moves a number of bfloat16 by up to 2 ** -8, and softmax and
# GELU behind it by more; float16 is eight times finer. Measured: at most 0.031 (OPT in bfloat16) and 0.0016.
GRADIENT_ERROR = {"bfloat16": 0.06, "float16": 0.0075}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Lets autocast be switched on, and tells which types it was switched on with."""
    switched = set()

    @contextmanager
    def auto_cast(enable=True, custom_white_list=None, custom_black_list=None, level="O1", dtype="float16"):
        tracer = _dygraph_tracer()
        before = tracer._amp_level, tracer._amp_dtype, tracer._get_amp_op_list()
        tracer._amp_level = core.AmpLevel.O1 if enable else core.AmpLevel.O0
        tracer._amp_dtype = dtype if enable else "float32"
        tracer._set_amp_op_list(*_update_list(custom_white_list, custom_black_list, level, dtype))
        switched.update({dtype} if enable else ())
        try:
            yield
        finally:
            tracer._amp_level, tracer._amp_dtype = before[:2]
            tracer._set_amp_op_list(*before[2])

    monkeypatch.setattr(paddle.amp, "auto_cast", auto_cast)
    return switched


def numbers() -> dict[str, paddle.Tensor]:
    generator = np.random.default_rng(0)
    ids_BL = paddle.to_tensor(generator.integers(3, VOCABULARY, [ROWS, LENGTH]))
    batch = {"image_BCHW": paddle.to_tensor(generator.normal(size=[ROWS, 3, 48, 48]).astype("float32"))}
    batch |= {"image_id_B": paddle.arange(ROWS), "negative_image_B": paddle.to_tensor([1, 2, 0])}
    batch |= {"negative_text_B": paddle.to_tensor([2, 0, 1])}
    batch |= dict.fromkeys(["text_ids_BL", "input_ids_BL", "output_ids_BT"], ids_BL)
    masks = ["text_mask_BL", "label_mask_BL", "input_mask_BL", "output_mask_BT"]
    return batch | dict.fromkeys(masks, paddle.ones_like(ids_BL))


def pair_of(cfg, stage: int):
    """(The objective in float32, the same stored as `cfg.precision` says.)"""
    paddle.seed(0)
    build = build_stage1 if stage == 1 else build_stage2
    exact, model = (build(cfg.model, vocab_size=VOCABULARY) for _ in range(2))
    for part, dtype in storage_types(cfg.precision.name, cfg.model).items():
        if dtype != "float32" and hasattr(model, part):
            store_in(getattr(model, part), dtype)
    fill(model, {name: stored_parameter(name, tensor) for name, tensor in exact.named_parameters()}, "here")
    for made in (exact, model):
        for part in ("vision", "language"):
            if hasattr(made, part):
                freeze(getattr(made, part))
    if stage == 1:
        return [Stage1Objective(made, Context(), cfg.task, dec_id=1) for made in (exact, model)]
    return [Stage2Objective(made) for made in (exact, model)]


def learned(objective, precision) -> tuple[float, dict[str, np.ndarray]]:
    set_train_mode(objective)
    with nullcontext() if precision is None else autocast(precision, "gpu:0"):
        batch = numbers()
        batch = objective.prepare([batch])[0] if hasattr(objective, "prepare") else batch
        loss = objective(batch)["loss"]
        with full_precision():
            loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    assert loss.dtype == paddle.float32 and {g.dtype for g in gradients.values()} == {paddle.float32}
    return float(loss), {name: gradient.numpy() for name, gradient in gradients.items()}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("stage", "model"), [(1, "tiny_opt"), (2, "tiny_opt"), (2, "tiny_t5")])
def test_a_step_goes_through_all_casts(stage, model, precision, on_a_cpu):
    words = [f"task=pretrain_stage{stage}", f"model={model}", f"precision={precision}", *SMALL]
    words += ["model.qformer.recompute=true", "model.language.recompute=true"]
    cfg = compose_config([*words, "task.contrast_steps=0"] if stage == 1 else words)
    exact, rounded = pair_of(cfg, stage)
    (wanted_loss, wanted), (loss, found) = learned(exact, None), learned(rounded, cfg.precision)
    low = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    coarsest = "bfloat16" if model == "tiny_t5" else low
    assert on_a_cpu == {low, coarsest}
    assert found.keys() == wanted.keys() and loss != wanted_loss
    assert loss == pytest.approx(wanted_loss, rel=2e-3)  # measured: 3e-4
    off = sum(float(((found[name] - wanted[name]) ** 2).sum()) for name in wanted)
    assert off < GRADIENT_ERROR[coarsest] ** 2 * sum(float((gradient**2).sum()) for gradient in wanted.values())


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_goes_through_all_casts(model, beams, on_a_cpu):
    cfg = compose_config(["task=pretrain_stage2", f"model={model}", "precision=fp16", *SMALL])
    scores = []
    for objective, precision in zip(pair_of(cfg, 2), (None, cfg.precision), strict=True):
        set_eval_mode(objective)
        network, batch = objective.model, numbers()
        with nullcontext() if precision is None else autocast(precision, "gpu:0"), paddle.no_grad():
            query_BQD = network.encode(batch["image_BCHW"])
            prefix = join_prefix(network.language, query_BQD, batch["text_ids_BL"], batch["text_mask_BL"])
            settings = GenerationSettings(max_new_tokens=4, min_new_tokens=4, num_beams=beams)
            scores.append(generate(network.language, prefix, settings, eos_id=2, pad_id=0).scores)
    np.testing.assert_allclose(scores[1], scores[0], rtol=5e-3)
    assert on_a_cpu
