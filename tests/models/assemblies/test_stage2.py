"""Stage 2's model: queries as a soft prompt before the language model's text. Numbers are tests/parity's matter."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2, join_prefix
from blip2x.models.freeze import freeze

IDS, MASK = paddle.to_tensor([[3, 4, 5], [6, 1, 1]]), paddle.to_tensor([[1, 1, 1], [1, 0, 0]])


ATOL = 1e-5  # float32 sums in another order, outputs of about 5


@pytest.fixture
def build(vision, qformer, language, enliven):
    return lambda kind: enliven(Stage2Model(vision(), qformer(vocab_size=None), language(kind), ln_vision_eps=1e-5))


@pytest.fixture
def asking(vision, qformer, language, enliven):
    """A model whose Q-Former reads questions."""
    return lambda kind="opt": enliven(Stage2Model(vision(), qformer(vocab_size=17), language(kind), ln_vision_eps=1e-5))


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


def in_numpy(model: Stage2Model, image: paddle.Tensor, ids: list[int]) -> np.ndarray:
    """The soft prompt [Q, D] of one image that is asked about, in float64, from the weights alone."""
    w = {name: value.numpy().astype("float64") for name, value in model.named_parameters()}

    def linear(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name, eps=1e-12):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def heads(x):
        return x.reshape(len(x), 2, -1).transpose(1, 0, 2)

    def attend(x, source, name):
        query, key, value = (
            heads(linear(of, f"{name}.{part}")) for part, of in (("query", x), ("key", source), ("value", source))
        )
        score = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(query.shape[-1]))
        mixed = (score / score.sum(-1, keepdims=True)) @ value
        return norm(x + linear(mixed.transpose(1, 0, 2).reshape(x.shape), f"{name}.out"), f"{name}.norm")

    def feed_forward(x, name):
        inner = linear(x, f"{name}.fc1")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        return norm(x + linear(inner, f"{name}.fc2"), f"{name}.norm")

    patch = norm(model.vision(image)[0].numpy().astype("float64"), "ln_vision", 1e-5)
    words = w["qformer.text.word_embeddings.weight"][ids] + w["qformer.text.position_embeddings.weight"][: len(ids)]
    hidden = norm(np.concatenate([w["qformer.query_tokens"][0], words]), "qformer.embeddings_norm")
    for name in ("qformer.layers.0", "qformer.layers.1"):
        hidden = attend(hidden, hidden, f"{name}.attention")
        query, text = hidden[:3], hidden[3:]
        if name.endswith("0"):
            query = attend(query, patch, f"{name}.cross_attention")
        hidden = np.concatenate([feed_forward(query, f"{name}.query_ffn"), feed_forward(text, f"{name}.text_ffn")])
    return linear(hidden[:3], "language_proj")


def test_images_that_are_asked_about_are_what_numpy_makes_of_them(asking, image):
    """The second question is shorter: its padding is no part of it."""
    model = asking()
    found = model.encode_asked(model.ln_vision(model.vision(image)), IDS, MASK).numpy()
    for row, ids in enumerate(([3, 4, 5], [6])):
        np.testing.assert_allclose(found[row], in_numpy(model, image[row : row + 1], ids), rtol=0, atol=ATOL)
    assert np.abs(found[1] - in_numpy(model, image[1:], [6, 1, 1])).max() > 0.1


def test_without_any_question_it_is_stage_2(asking, build, image):
    model, plain = asking(), build("opt")
    weights = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        parameter.set_value(weights[name])
    unread = model.encode_asked(model.ln_vision(model.vision(image)), IDS, paddle.zeros_like(MASK))
    np.testing.assert_allclose(unread.numpy(), plain.encode(image).numpy(), rtol=0, atol=ATOL)
    assert (model.encode_asked(model.ln_vision(model.vision(image)), IDS, MASK) - unread).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_image_encoder_projection_and_what_reads_questions_learn(asking, image, kind):
    model = asking(kind)
    freeze(model.language)
    prefix = join_prefix(model.language, model.encode_asked(model.ln_vision(model.vision(image)), IDS, MASK), IDS, MASK)
    logits = model.language(*prefix, IDS, MASK) if kind == "t5" else model.language(*prefix)
    logits[:, :, 0].sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not (p.grad.any() or n.endswith("key.bias"))}
    unread = ("qformer.layers.1.text_ffn.", "qformer.text.head_", "language.")  # nothing reads the text behind the last layer
    assert without == {name for name, _ in model.named_parameters() if name.startswith(unread)}
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("language."))
    assert model.qformer.layers[1].text_ffn.fc1.weight.grad is not None  # 0; DataParallel would wait for one that does not come
