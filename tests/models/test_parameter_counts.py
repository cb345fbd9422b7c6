"""Numbers of parameters of the published models, counted without memory: a wrong width, layer or stray matrix shows here.

The references were counted on Hugging Face transformers 4.57.6, which stores a bias of EVA's keys; it is 0 in the published
weights and does not exist here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import paddle
import pytest
from paddle import Tensor

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze

EVA_VIT_G, CLIP_VIT_L = 985_894_528, 290_581_504
KEY_BIASES = 39 * 1408
CAPTION_HEAD = (768 * 768 + 768) + 2 * 768 + 30_523  # transform, norm, bias; the matrix is the word embeddings'


def count(parameters: Iterable[Tensor]) -> int:
    return sum(math.prod(parameter.shape) for parameter in parameters)


def trainable(model: paddle.nn.Layer) -> int:
    return count(p for p in model.parameters() if not p.stop_gradient)


@pytest.fixture(scope="module")
def built():
    """`built(stage, name)` -> the model with its frozen parts frozen; nothing is allocated."""
    models = {}

    def build(stage: int, name: str):
        if (stage, name) not in models:
            cfg = compose_config([f"model={name}"]).model
            with paddle.LazyGuard():
                model = (build_stage1 if stage == 1 else build_stage2)(cfg, vocab_size=0)
            freeze(model.vision)
            if stage == 2:
                freeze(model.language)
            assert not any(p._is_initialized() for p in model.parameters())
            models[stage, name] = model
        return models[stage, name]

    return build


@pytest.mark.parametrize(
    ("name", "learning", "hugging_face"),
    [
        ("opt2.7b", 107_133_696, 3_744_679_936),
        ("opt6.7b", 108_314_880, 7_752_738_304),
        ("flant5xl", 106_739_968, 3_942_446_592),
        ("flant5xxl", 108_314_880, 12_229_596_672),
    ],
)
def test_stage_2(built, name, learning, hugging_face):
    model = built(2, name)
    assert trainable(model) == learning
    assert count(model.vision.parameters()) == EVA_VIT_G
    assert count(model.parameters()) == hugging_face - KEY_BIASES


@pytest.mark.parametrize(
    ("name", "learning", "eva"),
    [
        ("opt2.7b_vitl", 103_593_984, "opt2.7b"),
        ("opt6.7b_vitl", 104_775_168, "opt6.7b"),
        ("flant5xl_vitl", 103_200_256, "flant5xl"),
        ("flant5xxl_vitl", 104_775_168, "flant5xxl"),
    ],
)
def test_stage_2_of_the_smaller_image_encoder(built, name, learning, eva):
    """Narrower patches: six layers' keys and values, and the norm behind the encoder, are all that learns less."""
    model, other = built(2, name), built(2, eva)
    assert trainable(model) == learning == trainable(other) - (1408 - 1024) * (6 * 2 * 768 + 2)
    assert count(model.vision.parameters()) == CLIP_VIT_L
    assert count(model.language.parameters()) == count(other.language.parameters())


def test_stage_1(built):
    """Hugging Face's image-text matching model has neither captions nor a temperature."""
    model = built(1, "opt2.7b")
    assert trainable(model) == 186_705_470
    assert count(model.parameters()) == 1_172_032_258 - KEY_BIASES + CAPTION_HEAD + 1 == 1_172_599_998


def test_stage_1_of_the_smaller_image_encoder(built):
    model = built(1, "opt2.7b_vitl")
    assert trainable(model) == 183_165_758 == 186_705_470 - (1408 - 1024) * (6 * 2 * 768 + 2)
    assert count(model.parameters()) == 183_165_758 + CLIP_VIT_L


def test_fine_tuning_on_questions():
    """The image encoder at 490 pixels, and a Q-Former that reads: 1.2 billion parameters learn (paper, table 4)."""
    cfg = compose_config(["model=opt2.7b", "model.vision.image_size=490"]).model
    with paddle.LazyGuard():
        model = build_stage2(cfg, vocab_size=0, question_vocab_size=0)
    freeze(model.language)
    positions = (35 * 35 - 16 * 16) * 1408
    feed_forward = 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    reading = (30_523 + 512) * 768 + 12 * feed_forward
    assert trainable(model) == EVA_VIT_G + positions + 107_133_696 + reading == 1_174_915_072
