"""Writing step by step equals one pass over the whole text, and the decoder fits blip2x.generation."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from blip2x.errors import UserError
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.qformer.captioner import QFormerCaptioner

ATOL = 1e-5  # float32 sums in another order, logits of about 5
DEC, END, PAD = 16, 2, 0


@pytest.fixture
def captioner(qformer):
    return QFormerCaptioner(qformer, dec_id=DEC)


@pytest.fixture
def prefix(qformer, patches):
    return qformer.encode_image(patches)[1]


def whole(qformer, ids: list[list[int]], cache) -> np.ndarray:
    ids = paddle.to_tensor(ids)
    return qformer.caption_logits(ids, paddle.ones_like(ids), cache).numpy()


def test_steps_equal_one_pass(captioner, qformer, prefix):
    ids = [[DEC, 4, 5, 6, 7], [DEC, 9, 3, 3, 11]]
    expected = whole(qformer, ids, prefix)
    logits, state = captioner.prefill(prefix)
    np.testing.assert_allclose(logits.numpy(), expected[:, 0], atol=ATOL)
    for position in range(1, 5):
        logits, state = captioner.step(paddle.to_tensor([row[position] for row in ids]), state)
        np.testing.assert_allclose(logits.numpy(), expected[:, position], atol=ATOL)
    assert np.abs(expected).max() > 1


def test_reordered_rows_go_on_as_the_images_and_texts_they_came_from(captioner, qformer, prefix, patches):
    _, state = captioner.prefill(prefix)
    _, state = captioner.step(paddle.to_tensor([4, 9]), state)
    logits, _ = captioner.step(paddle.to_tensor([5, 6, 7]), captioner.reorder(state, np.array([1, 0, 1])))
    _, cache = qformer.encode_image(patches[paddle.to_tensor([1, 0, 1])])
    expected = whole(qformer, [[DEC, 9, 5], [DEC, 4, 6], [DEC, 9, 7]], cache)
    np.testing.assert_allclose(logits.numpy(), expected[:, -1], atol=ATOL)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_score_what_one_pass_gives_them(captioner, qformer, prefix, beams):
    settings = GenerationSettings(max_new_tokens=6, num_beams=beams, num_return_sequences=beams, length_penalty=1.0)
    out = generate(captioner, prefix, settings, eos_id=END, pad_id=PAD)
    assert len(out.ids) == len(out.scores) == 2 * beams
    for row, (ids, score) in enumerate(zip(out.ids.tolist(), out.scores, strict=True)):
        text = ids[: ids.index(END) + 1] if END in ids else ids
        cache = [tuple(tensor[row // beams : row // beams + 1] for tensor in pair) for pair in prefix]
        logits = paddle.to_tensor(whole(qformer, [[DEC, *text[:-1]]], cache)[0])
        logprob = F.log_softmax(logits, axis=-1).numpy()[np.arange(len(text)), text]
        assert score == pytest.approx(logprob.sum() / len(text), abs=ATOL)
        if beams == 1:
            assert text == logits.argmax(axis=-1).tolist()


def test_a_caption_beyond_the_positions_is_one_sentence(captioner, prefix):
    settings = GenerationSettings(max_new_tokens=9, min_new_tokens=9)
    with pytest.raises(UserError, match=r"9 tokens is longer than the Q-Former's 8 positions; .* task\.max_new_tokens"):
        generate(captioner, prefix, settings, eos_id=END, pad_id=PAD)
