"""Models loaded for a low precision: frozen parts in the low type, the rest in float32, the numbers of their files in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.base import core

from blip2x.config.compose import compose_config
from blip2x.engine.amp import dtype_map
from blip2x.models.weights.checkpoint import split_state
from blip2x.tasks.common.models import ModelLoader

HUGGING_FACE = Path(__file__).resolve().parents[2] / "parity" / "huggingface"
VISION = {  # of an EVA ViT in bfloat16; numbers of layers are "*"
    "vision.embeddings.class_token": "float32",
    "vision.embeddings.positions": "float32",
    "vision.embeddings.projection": "bfloat16",
    "vision.blocks.*.norm1": "float32",
    "vision.blocks.*.attention": "bfloat16",
    "vision.blocks.*.norm2": "float32",
    "vision.blocks.*.fc1": "bfloat16",
    "vision.blocks.*.fc2": "bfloat16",
}


@pytest.fixture
def loader(small, run):
    """`loader(*overrides)`."""
    data = ["dataset=custom", "dataset.images=/no/where"]
    return lambda *overrides: ModelLoader.of_run(compose_config(["task=caption", *small, *data, *overrides]), run)


def types_of(layer: paddle.nn.Layer) -> set[str]:
    return {str(parameter.dtype).removeprefix("paddle.") for parameter in layer.parameters()}


def assert_rounded(model: paddle.nn.Layer, exact: paddle.nn.Layer) -> None:
    """float32 to the bit, bfloat16 to its eight digits."""
    wanted = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        rtol = 0 if parameter.dtype == paddle.float32 else 2**-8
        np.testing.assert_allclose(parameter.astype("float32").numpy(), wanted[name].numpy(), rtol=rtol, err_msg=name)


def test_stage_1(loader, trained):
    weights = f"model.weights={trained}/pretrain_stage1/checkpoint"
    exact, _ = loader(weights).stage1()
    model, _ = loader(weights, "precision=bf16").stage1()
    exactly = dict.fromkeys(("temp", "ln_vision", "qformer", "vision_proj", "text_proj", "itm_head"), "float32")
    assert dtype_map(exact) == {**exactly, "vision": "float32"}
    assert dtype_map(model) == {**exactly, **VISION}
    assert_rounded(model, exact)
    assert split_state(model)[0].keys() == split_state(exact)[0].keys()  # what a checkpoint has


def test_stage_2_takes_no_more_memory_than_it_needs(loader, trained):
    weights = f"model.weights={trained}/pretrain_stage2/checkpoint"
    exact, _ = loader(weights).stage2(new_projection=False)
    made = loader(weights, "precision=bf16")
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    model, _ = made.stage2(new_projection=False)
    taken = core.host_memory_stat_peak_value("Allocated", 0) - before
    needed = sum(parameter.size * parameter.element_size() for parameter in model.parameters())
    assert needed < 0.9 * sum(parameter.size * 4 for parameter in exact.parameters())
    assert taken < 1.05 * needed  # measured: 1.00
    assert {name: kind for name, kind in dtype_map(model).items() if name.startswith("vision")} == VISION
    assert {name: kind for name, kind in dtype_map(model).items() if not name.startswith(("vision", "language."))} == (
        dict.fromkeys(("ln_vision", "qformer", "language_proj"), "float32")
    )
    words = model.language.opt.embeddings.word_embeddings.weight
    assert words.dtype == paddle.bfloat16 and words.stop_gradient
    assert types_of(model.language.opt.decoder.layers[0].linear1) == {"bfloat16"}
    assert types_of(model.language.opt.decoder.final_layer_norm) == {"float32"}
    assert_rounded(model, exact)


@pytest.mark.parametrize(("name", "reader"), [("opt", "float16"), ("t5", "bfloat16")])
def test_under_fp16_t5_is_bfloat16(name, reader, run):
    words = ["task=caption", "model=auto", f"model.weights={HUGGING_FACE / name}", "dataset=custom", "dataset.images=x"]
    words += ["task.max_new_tokens=3", "task.min_new_tokens=1"]
    loader = ModelLoader.of_run(compose_config([*words, "precision=fp16"]), run)
    model = loader.stage2_model(0, new_projection=False)
    assert types_of(model.vision) == {"float16", "float32"}
    assert types_of(model.language) == {reader, "float32"}
    assert types_of(model.qformer) == types_of(model.language_proj) == {"float32"}


def test_a_part_that_is_trained_is_float32_beside_a_frozen_one(loader, trained):
    start = f"model.weights={trained}/pretrain_stage1/checkpoint"
    model, _ = loader(start, "model.vision.frozen=false", "precision=bf16").stage1()
    assert types_of(model) == {"float32"}
    # a language model without weights is built with memory, and all of the model with it
    tokenizer = f"model.language.tokenizer={trained}/pretrain_language/checkpoint/tokenizers/language"
    language = ["model.language.frozen=false", tokenizer]
    model, _ = loader(start, *language, "precision=bf16").stage2(new_projection=True)
    assert types_of(model.language) == {"float32"} and types_of(model.vision) == {"bfloat16", "float32"}


def test_a_language_model_that_is_fitted_is_float32(loader, trained):
    weights = f"model.language.weights={trained}/pretrain_language/checkpoint"
    model, _ = loader(weights, "precision=bf16").language()
    assert types_of(model) == {"float32"}
