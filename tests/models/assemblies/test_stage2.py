"""Stage 2's model: queries as a soft prompt before the language model's text. Numbers are tests/parity's matter."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2, join_prefix
from blip2x.models.freeze import freeze

IDS, MASK = paddle.to_tensor([[3, 4, 5], [6, 1, 1]]), paddle.to_tensor([[1, 1, 1], [1, 0, 0]])


@pytest.fixture
def build(vision, qformer, language, enliven):
    return lambda kind: enliven(Stage2Model(vision(), qformer(vocab_size=None), language(kind), ln_vision_eps=1e-5))


@pytest.mark.parametrize("rows", [1, 2])
def test_soft_prompt_has_the_language_model_s_width(build, image, rows):
    assert build("opt").encode(image[:rows]).shape == [rows, 3, 16]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_queries_stand_before_the_text_and_are_all_seen(build, image, kind):
    model = build(kind)
    query = model.encode(image)
    embeds, mask = join_prefix(model.language, query, IDS, MASK)
    np.testing.assert_array_equal(embeds[:, :3].numpy(), query.numpy())
    np.testing.assert_array_equal(embeds[:, 3:].numpy(), model.language.embed(IDS).numpy())
    assert mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]


def test_without_queries_there_is_the_text_alone(build):
    language = build("opt").language
    embeds, mask = join_prefix(language, None, IDS, MASK)
    np.testing.assert_array_equal(embeds.numpy(), language.embed(IDS).numpy())
    assert mask.tolist() == MASK.tolist()


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_exactly_what_is_not_frozen_learns_through_the_language_model(build, image, kind):
    model = build(kind)
    freeze(model.vision)
    freeze(model.language)
    prefix = join_prefix(model.language, model.encode(image), IDS, MASK)
    logits = model.language(*prefix, IDS, MASK) if kind == "t5" else model.language(*prefix)
    logits[:, :, 0].sum().backward()
    # the gradient of a key's bias is 0 but for rounding, as softmax does not see it
    without = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad.any() or n.endswith("key.bias"))]
    assert without == [name for name, _ in model.named_parameters() if name.startswith(("vision.", "language."))]


def test_all_but_the_language_model_and_its_projection_comes_from_stage_1(build, vision, qformer):
    sizes = {"embed_dim": 7, "ln_vision_eps": 1e-5, "temperature": 0.07}
    stage1 = dict(Stage1Model(vision(), qformer(vocab_size=17), **sizes).named_parameters())
    stage2 = dict(build("opt").named_parameters())
    new = {name for name in stage2.keys() - stage1.keys() if not name.startswith("language.")}
    assert new == {"language_proj.weight", "language_proj.bias"}
    assert all(stage1[name].shape == stage2[name].shape for name in stage1.keys() & stage2.keys())


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_t5"])
def test_built_from_the_config_with_the_tokenizer_s_vocabulary(name):
    cfg = compose_config([f"model={name}"]).model
    cfg.ln_vision_eps = 1e-6
    model = build_stage2(cfg, vocab_size=77)
    assert model.language.vocab_size == 77 and model.qformer.text is None
    assert model.language.is_encoder_decoder == (name == "tiny_t5")
    assert model.language_proj.weight.shape == [96, 96] and model.ln_vision._epsilon == 1e-6
