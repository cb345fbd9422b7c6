"""T5's adapter: padding is not read, decoding step by step equals one pass. Numbers are tests/parity's matter."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.models.language.t5 import RmsNorm, build
from blip2x.models.prefix import SharedPrefix

ATOL = 2e-5  # float32 sums in another order, logits of about 5


def ones(batch: int, length: int) -> paddle.Tensor:
    return paddle.ones([batch, length], dtype="int64")


def texts(*rows: list[int]) -> paddle.Tensor:
    return paddle.to_tensor(rows)


READ = ([3, 4, 5, 6], [2, 8, 9, 1])
READ_MASK = ([1, 1, 1, 1], [1, 1, 0, 0])
WRITTEN = ([0, 7, 7, 2], [0, 1, 9, 5])  # after the start token


def test_padding_of_the_encoder_is_not_read(t5):
    embeds, mask = t5.embed(texts(*READ)), texts(*READ_MASK)
    logits = t5(embeds, mask, texts(*WRITTEN), ones(2, 4)).numpy()
    short = t5(embeds[1:, :2], mask[1:, :2], texts(WRITTEN[1]), ones(1, 4)).numpy()
    np.testing.assert_allclose(logits[1], short[0], atol=ATOL)
    assert np.abs(logits).max() > 1


def test_padding_and_later_tokens_of_the_decoder_are_not_read(t5):
    embeds, mask = t5.embed(texts(*READ)), texts(*READ_MASK)
    logits = t5(embeds, mask, texts(*WRITTEN), texts([1, 1, 1, 1], [1, 1, 0, 0])).numpy()
    short = t5(embeds, mask, texts(*WRITTEN)[:, :2], ones(2, 2)).numpy()
    np.testing.assert_allclose(logits[:, :2], short, atol=ATOL)
    assert np.isfinite(logits).all()


def test_steps_with_a_cache_equal_one_pass(t5):
    embeds, mask = t5.embed(texts(*READ)), texts(*READ_MASK)
    whole = t5(embeds, mask, texts(*WRITTEN), ones(2, 4)).numpy()
    logits, state = t5.prefill((embeds, mask))  # the start token is its own affair
    np.testing.assert_allclose(logits.numpy(), whole[:, 0], atol=ATOL)
    for position in (1, 2, 3):
        logits, state = t5.step(texts(*WRITTEN)[:, position], state)
        np.testing.assert_allclose(logits.numpy(), whole[:, position], atol=ATOL)


def test_reordered_rows_go_on_as_the_texts_they_came_from(t5):
    embeds, mask = t5.embed(texts(*READ)), texts(*READ_MASK)
    _, state = t5.prefill((embeds, mask))
    logits, _ = t5.step(texts(6, 4, 3), t5.reorder(state, np.array([1, 0, 1])))
    for row, (source, token) in enumerate([(1, 6), (0, 4), (1, 3)]):
        text, seen = embeds[source : source + 1], mask[source : source + 1]
        expected = t5(text, seen, texts([0, token]), ones(1, 2))
        np.testing.assert_allclose(logits[row].numpy(), expected[0, 1].numpy(), atol=ATOL)


def test_dropout_acts_in_train_mode_only(t5):
    words = (t5.embed(texts(*READ)), texts(*READ_MASK), texts(*WRITTEN), ones(2, 4))
    np.testing.assert_array_equal(t5(*words).numpy(), t5(*words).numpy())
    t5.train()
    try:
        assert np.abs(t5(*words).numpy() - t5(*words).numpy()).max() > 0.1
    finally:
        t5.eval()


def test_rms_norm_by_hand():
    norm = RmsNorm(2)
    norm.weight.set_value(paddle.to_tensor([1.0, 10.0]))
    np.testing.assert_allclose(norm(paddle.to_tensor([[3.0, -4.0]])).numpy(), [[3 / 12.5**0.5, -40 / 12.5**0.5]], rtol=1e-6)


@pytest.mark.parametrize(("activation", "approximate"), [("gelu", False), ("gelu_tanh", True)])
def test_built_from_the_config(activation, approximate):
    cfg = compose_config(["model=tiny_t5", f"model.language.activation={activation}"]).model.language
    model = build(cfg, vocab_size=77)
    assert (model.vocab_size, model.width, len(model.encoder.block), len(model.decoder.block)) == (77, 96, 2, 2)
    gates = [layer for layer in model.sublayers() if type(layer).__name__ == "GELU"]
    assert len(gates) == 4 and all(gate._approximate is approximate for gate in gates)


def test_texts_about_one_image_are_read_with_its_queries_each(t5):
    query_IQD, ids, mask = t5.embed(texts([3, 4, 5], [6, 7, 8])), texts([1, 2], [9, 0], [3, 3]), texts([1, 1], [1, 0], [1, 1])
    logits, _ = t5.prefill(SharedPrefix(t5.share(query_IQD), np.array([1, 0, 1]), t5.embed(ids), mask))
    for row, image in enumerate([1, 0, 1]):
        length = int(mask[row].sum())
        own = paddle.concat([query_IQD[image : image + 1], t5.embed(ids[row : row + 1, :length])], axis=1)
        np.testing.assert_allclose(logits[row].numpy(), t5.prefill((own, ones(1, 3 + length)))[0][0].numpy(), atol=ATOL)
