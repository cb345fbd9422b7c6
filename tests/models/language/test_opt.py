"""OPT's adapter: positions count tokens only, decoding step by step equals one pass. Numbers are tests/parity's matter."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.language.opt import build
from blip2x.models.prefix import SharedPrefix, SharedQueries, written_out

ATOL = 2e-5  # float32 sums in another order, logits of about 5


def ones(batch: int, length: int) -> paddle.Tensor:
    return paddle.ones([batch, length], dtype="int64")


def texts(*rows: list[int]) -> paddle.Tensor:
    return paddle.to_tensor(rows)


def test_padding_anywhere_changes_no_token_s_logits(opt):
    """Queries, a gap, and a prompt padded on the left, as a batch of prompts of several lengths has them."""
    compact_BLD = opt.embed(texts([3, 4, 5, 6, 7]))
    expected = opt(compact_BLD, ones(1, 5)).numpy()[0]
    noise = paddle.full([1, 1, opt.width], 50.0)
    mask = texts([0, 1, 1, 0, 0, 1, 1, 1, 0])
    pieces = [noise, compact_BLD[:, :2], noise, noise, compact_BLD[:, 2:], noise]
    padded = opt(paddle.concat(pieces, axis=1), mask).numpy()[0]
    np.testing.assert_allclose(padded[mask.numpy()[0].astype(bool)], expected, atol=ATOL)
    assert np.abs(expected).max() > 1


def test_a_row_of_padding_only_stays_finite(opt):
    assert np.isfinite(opt(opt.embed(texts([1, 2], [3, 4])), texts([0, 0], [1, 1])).numpy()).all()


def test_later_tokens_change_nothing_before_them(opt):
    first, second = (opt(opt.embed(texts([3, 4, last])), ones(1, 3)).numpy() for last in (5, 6))
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    assert np.abs(first[:, 2] - second[:, 2]).max() > 0.1


def test_steps_with_a_cache_equal_one_pass(opt):
    ids, mask = texts([3, 4, 5, 6, 7], [2, 8, 9, 1, 4]), texts([1, 1, 1, 1, 1], [0, 1, 1, 1, 1])
    whole = opt(opt.embed(ids), mask).numpy()
    logits, state = opt.prefill((opt.embed(ids[:, :3]), mask[:, :3]))
    np.testing.assert_allclose(logits.numpy(), whole[:, 2], atol=ATOL)
    for position in (3, 4):
        logits, state = opt.step(ids[:, position], state)
        np.testing.assert_allclose(logits.numpy(), whole[:, position], atol=ATOL)


def test_reordered_rows_go_on_as_the_texts_they_came_from(opt):
    ids, mask = texts([3, 4, 5], [2, 8, 9], [7, 7, 1]), texts([1, 1, 1], [0, 1, 1], [0, 0, 1])
    _, state = opt.prefill((opt.embed(ids), mask))
    chosen = np.array([2, 0, 2])  # one row twice, one never
    logits, _ = opt.step(texts(6, 1, 4), opt.reorder(state, chosen))
    for row, (source, token) in enumerate([(2, 6), (0, 1), (2, 4)]):
        text = opt.embed(paddle.concat([ids[source], paddle.to_tensor([token])]).unsqueeze(0))
        expected = opt(text, paddle.concat([mask[source], paddle.to_tensor([1])]).unsqueeze(0))
        np.testing.assert_allclose(logits[row].numpy(), expected[0, -1].numpy(), atol=ATOL)


def test_the_longest_text_fits_and_one_token_more_is_one_sentence(opt):
    full = opt.embed(paddle.ones([1, 10], dtype="int64"))
    _, state = opt.prefill((full, ones(1, 10)))
    sentence = "a text of 11 tokens, queries included, is longer than OPT's 10 positions"
    with pytest.raises(UserError, match=sentence):
        opt.step(texts(1), state)
    with pytest.raises(UserError, match=sentence):
        opt(paddle.concat([full, full[:, :1]], axis=1), ones(1, 11))


def test_a_short_text_goes_on_when_a_longer_one_beside_it_has_filled_all_positions(opt):
    """Padding takes no position, so that a text is as long as it may be in any batch."""
    ids, mask = texts([3] * 10, [*[0] * 8, 4, 5]), texts([1] * 10, [*[0] * 8, 1, 1])
    _, state = opt.prefill((opt.embed(ids), mask))
    _, alone = opt.prefill((opt.embed(ids[1:, 8:]), ones(1, 2)))
    state = opt.reorder(state, np.array([1]))
    for token in range(8):
        logits, state = opt.step(texts(token), state)
        expected, alone = opt.step(texts(token), alone)
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=ATOL)
    with pytest.raises(UserError, match="a text of 11 tokens"):
        opt.step(texts(1), state)


def test_dropout_acts_in_train_mode_only(opt):
    embeds = opt.embed(texts([3, 4, 5]))
    np.testing.assert_array_equal(opt(embeds, ones(1, 3)).numpy(), opt(embeds, ones(1, 3)).numpy())
    opt.train()
    try:
        assert np.abs(opt(embeds, ones(1, 3)).numpy() - opt(embeds, ones(1, 3)).numpy()).max() > 0.1
    finally:
        opt.eval()


def test_head_is_the_word_embedding(opt):
    assert sum(p.shape == [11, 12] for p in opt.parameters()) == 1


def test_built_from_the_config_with_the_tokenizer_s_vocabulary():
    cfg = compose_config(["model=tiny_opt"]).model.language
    assert build(cfg, vocab_size=77).vocab_size == 77
    cfg.vocab_size = 50
    model = build(cfg, vocab_size=77)
    assert (model.vocab_size, model.width, model.depth, model.max_positions) == (50, 96, 3, 128)


def test_texts_about_one_image_go_on_from_queries_that_were_read_once(opt, monkeypatch):
    """Two images, three texts, of which two about the second; the images' queries pass through the layers alone."""
    query_IQD = opt.embed(texts([3, 4, 5], [6, 7, 8]))
    image_B, ids, mask = np.array([1, 0, 1]), texts([1, 2], [0, 9], [3, 3]), texts([1, 1], [0, 1], [1, 1])
    prefix = SharedPrefix(opt.share(query_IQD), image_B, opt.embed(ids), mask)
    widths = []
    linear = type(opt.opt.decoder.layers[0].linear1)
    monkeypatch.setattr(linear, "forward", watched(linear.forward, lambda hidden: widths.append(hidden.shape[1])))
    logits, state = opt.prefill(prefix)
    assert max(width for width in widths if width < opt.width) == 2  # positions that the layers read
    joined = written_out(prefix)
    expected, alone = opt.prefill(joined)
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=ATOL)
    for token in (5, 6):
        logits, state = opt.step(texts(token, token, 1), state)
        expected, alone = opt.step(texts(token, token, 1), alone)
        np.testing.assert_allclose(logits.numpy(), expected.numpy(), atol=ATOL)
    assert np.abs(expected.numpy()).max() > 1


def test_queries_that_were_not_read_ahead_are_read_with_their_text(opt):
    image_B, ids, mask = np.array([1, 0]), texts([1, 2], [0, 9]), texts([1, 1], [0, 1])
    query_IQD, text_BLD = opt.embed(texts([3, 4, 5], [6, 7, 8])), opt.embed(ids)
    ahead = SharedPrefix(opt.share(query_IQD), image_B, text_BLD, mask)
    with_text = SharedPrefix(SharedQueries(query_IQD, None), image_B, text_BLD, mask)
    np.testing.assert_allclose(opt.prefill(with_text)[0].numpy(), opt.prefill(ahead)[0].numpy(), atol=ATOL)


def watched(forward, note):
    def call(self, hidden):
        note(hidden)
        return forward(self, hidden)

    return call
