"""Stage 1's model: the heads around the Q-Former. Numbers are tests/parity's matter."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import Stage1Model, build_stage1
from blip2x.models.freeze import freeze
from blip2x.models.weights.describe import follow_source

IDS, MASK = paddle.to_tensor([[3, 4, 5, 6], [3, 8, 9, 0]]), paddle.to_tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


@pytest.fixture
def model(vision, qformer, enliven):
    sizes = {"embed_dim": 7, "ln_vision_eps": 1e-5, "temperature": 0.07}
    return enliven(Stage1Model(vision(), qformer(vocab_size=17), **sizes))


@pytest.mark.parametrize("rows", [1, 2])
def test_features_are_unit_vectors(model, image, rows):
    patches, queries, image_features, cache = model.image_features(image[:rows])
    text_features = model.text_features(IDS[:rows], MASK[:rows])
    assert patches.shape == [rows, 10, 10] and queries.shape == [rows, 3, 12] and len(cache) == 2
    assert image_features.shape == [rows, 3, 7] and text_features.shape == [rows, 7]
    for features in (image_features, text_features):
        np.testing.assert_allclose(np.linalg.norm(features.numpy(), axis=-1), 1, atol=1e-6)


def test_a_text_s_feature_is_its_first_token_s(model):
    hidden = model.qformer.encode_text(IDS, MASK)
    expected = model.text_proj(hidden).numpy()
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.text_features(IDS, MASK).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_matching_is_the_mean_of_all_queries_decisions(model, image, rows):
    patches = model.image_features(image[:rows])[0]
    ids, mask = IDS[:rows], MASK[:rows]
    each = model.itm_head(model.qformer.encode_pair(patches, ids, mask)).numpy()
    assert each.shape == (rows, 3, 2)
    np.testing.assert_allclose(model.itm_logits(patches, ids, mask).numpy(), each.mean(axis=1), atol=1e-6)


def test_every_trained_parameter_gets_a_gradient(model, image):
    """Losses of all three kinds together; no parameter only takes up space."""
    freeze(model.vision)
    patches, _, image_features, cache = model.image_features(image)
    captions = model.qformer.caption_logits(IDS, MASK, cache)
    outputs = [image_features[..., 0], model.text_features(IDS, MASK)[:, 0], model.itm_logits(patches, IDS, MASK)[:, 0]]
    loss = paddle.add_n([output.sum() for output in outputs]) / model.temp + captions[:, :, 0].sum()
    loss.backward()
    # the gradient of a key's bias is 0 but for rounding, as softmax does not see it
    without = [n for n, p in model.named_parameters() if p.grad is None or not (p.grad.any() or n.endswith("key.bias"))]
    assert without == [name for name, _ in model.named_parameters() if name.startswith("vision.")]


def test_built_from_the_config_with_the_tokenizer_s_vocabulary():
    cfg = follow_source(compose_config(["model=tiny_opt"]).model, None)
    model = build_stage1(cfg, vocab_size=77)
    assert model.qformer.text.word_embeddings.weight.shape == [77, 96]
    assert model.vision_proj.weight.shape == model.text_proj.weight.shape == [96, 64]
    assert float(model.temp) == pytest.approx(0.07) and model.temp.shape == [1]
    assert model.ln_vision._epsilon == 1e-5
    cfg.qformer.vocab_size, cfg.ln_vision_eps = 50, 1e-6
    model = build_stage1(cfg, vocab_size=77)
    assert model.qformer.text.word_embeddings.weight.shape == [50, 96] and model.ln_vision._epsilon == 1e-6
