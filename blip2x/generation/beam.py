"""Beam search, and sampling over beams, with the semantics of Hugging Face transformers 4.57.

The device scores the candidates of all beams at once and hands over the best; choosing among those is NumPy on the host, for
all images at once, so that a step waits for the device once.

B images still open, K beams, C = 2K candidates per image, N = B x K rows, T new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.generation.logits import gumbel_noise, process
from blip2x.generation.protocol import Decoder
from blip2x.generation.sample import seen_tokens
from blip2x.generation.settings import GenerationSettings
from blip2x.losses.log_softmax import log_softmax

NEVER = np.float32(-1e9)  # added to a score: not to be chosen while there is any other


@dataclass
class Beams:
    """The texts that go on and the best ones that ended, both best first."""

    ids_BKT: np.ndarray
    score_BK: np.ndarray  # sums of log-probabilities
    ended_ids_BKT: np.ndarray
    ended_score_BK: np.ndarray  # sums / length ** length_penalty
    has_ended_BK: np.ndarray  # false: nothing has ended in this place yet

    @classmethod
    def start(cls, images: int, beams: int, steps: int, pad_id: int) -> Beams:
        """Nothing written yet; one live beam per image, or else all beams would write the same text."""
        ids_BKT = np.full((images, beams, steps), pad_id, np.int64)
        score_BK = np.full((images, beams), NEVER)
        ended_score_BK = score_BK.copy()
        score_BK[:, 0] = 0
        return cls(ids_BKT, score_BK, ids_BKT.copy(), ended_score_BK, np.zeros((images, beams), bool))

    def rows(self, chosen_B: np.ndarray) -> Beams:
        """The beams of some of the images."""
        return Beams(*(getattr(self, name)[chosen_B] for name in self.__dataclass_fields__))


def advance(
    beams: Beams,
    score_BC: np.ndarray,
    parent_BC: np.ndarray,
    token_BC: np.ndarray,
    *,
    length: int,
    settings: GenerationSettings,
    eos_id: int,
) -> tuple[Beams, np.ndarray, np.ndarray]:
    """One step: `token_BC` would follow beam `parent_BC`, making texts of `length` tokens; candidates come best first.

    Returns the new beams, which beam each of them continues [B, K], and for which images the search is over [B].
    """
    keep = beams.score_BK.shape[1]
    ids_BCT = np.take_along_axis(beams.ids_BKT, parent_BC[:, :, None], axis=1)
    ids_BCT[:, :, length - 1] = token_BC
    ends_BC = (token_BC == eos_id) | (length == settings.max_new_tokens)

    live_score_BC = score_BC + np.where(ends_BC, NEVER, np.float32(0))
    best_BK = _best(live_score_BC, keep)
    score_BK = np.take_along_axis(live_score_BC, best_BK, axis=1)

    # of the candidates, only the K best may end; the others are there to go on when those end
    just_ended_BC = ends_BC & (np.arange(score_BC.shape[1]) < keep)
    scale = np.float32(length**settings.length_penalty)
    ended_score_BC = score_BC / scale + np.where(just_ended_BC, np.float32(0), NEVER)
    merged_score = np.concatenate([beams.ended_score_BK, ended_score_BC], axis=1)
    merged_ids = np.concatenate([beams.ended_ids_BKT, ids_BCT], axis=1)
    has_ended = np.concatenate([beams.has_ended_BK, just_ended_BC], axis=1)
    kept_BK = _best(merged_score, keep)
    after = Beams(
        ids_BKT=np.take_along_axis(ids_BCT, best_BK[:, :, None], axis=1),
        score_BK=score_BK,
        ended_ids_BKT=np.take_along_axis(merged_ids, kept_BK[:, :, None], axis=1),
        ended_score_BK=np.take_along_axis(merged_score, kept_BK, axis=1),
        has_ended_BK=np.take_along_axis(has_ended, kept_BK, axis=1),
    )
    return after, np.take_along_axis(parent_BC, best_BK, axis=1), _is_over(after, scale, settings)


def _is_over(beams: Beams, scale: np.float32, settings: GenerationSettings) -> np.ndarray:
    """The best live text, scored as if it ended here, cannot replace an ended one; or K have ended and that is enough [B]."""
    worst_BK = np.where(beams.has_ended_BK, beams.ended_score_BK.min(axis=1, keepdims=True), NEVER)
    over_B = ~(beams.score_BK[:, :1] / scale > worst_BK).any(axis=1)
    return over_B | beams.has_ended_BK.all(axis=1) if settings.early_stopping else over_B


def _best(score: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest scores of each row, best first, the first of equal ones first."""
    return np.argsort(-score, axis=1, kind="stable")[:, :count]


def beam_search(
    decoder: Decoder,
    logits_BV: Tensor,
    state: Any,
    settings: GenerationSettings,
    *,
    eos_id: int,
    pad_id: int,
    start_id: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continue a prefilled state: the best texts' ids [B x R, T] and their scores, R = num_return_sequences, best first."""
    images, keep, steps = logits_BV.shape[0], settings.num_beams, settings.max_new_tokens
    beams = Beams.start(images, keep, steps, pad_id)
    done = Beams.start(images, keep, steps, pad_id)
    image_B = np.arange(images)  # those still open
    row_N = np.repeat(image_B, keep)  # each beam's row in the state: beams share their image's until they differ
    logits_NV = paddle.index_select(logits_BV, paddle.to_tensor(row_N), axis=0)
    for length in range(1, steps + 1):
        logprob_NV = log_softmax(logits_NV, axis=1)
        seen_NT = seen_tokens(beams.ids_BKT.reshape(-1, steps)[:, : length - 1], start_id)
        logprob_NV = process(logprob_NV, seen_NT, settings, length=length - 1, eos_id=eos_id)
        candidates = _candidates(logprob_NV, beams.score_BK, do_sample=settings.do_sample)
        beams, parent_BK, is_over_B = advance(beams, *candidates, length=length, settings=settings, eos_id=eos_id)
        if length == steps:
            is_over_B[:] = True
        for name in ("ended_ids_BKT", "ended_score_BK"):
            getattr(done, name)[image_B[is_over_B]] = getattr(beams, name)[is_over_B]
        if is_over_B.all():
            break
        row_BK = row_N.reshape(-1, keep)
        row_N = np.take_along_axis(row_BK, parent_BK, axis=1)[~is_over_B].reshape(-1)
        image_B, beams = image_B[~is_over_B], beams.rows(~is_over_B)
        if not np.array_equal(row_N, np.arange(row_BK.size)):
            state = decoder.reorder(state, paddle.to_tensor(row_N))
        row_N = np.arange(len(row_N))
        token_N = paddle.to_tensor(beams.ids_BKT[:, :, length - 1].reshape(-1))
        logits_NV, state = decoder.step(token_N, state)
    results = settings.num_return_sequences
    ids = done.ended_ids_BKT[:, :results].reshape(images * results, steps)
    return ids, done.ended_score_BK[:, :results].reshape(-1)


def _candidates(logprob_NV: Tensor, score_BK: np.ndarray, *, do_sample: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 2K best (or drawn) continuations of each image's beams: scores, beams and tokens, [B, C] each."""
    images, keep = score_BK.shape
    vocabulary = logprob_NV.shape[1]
    total_NV = logprob_NV + paddle.to_tensor(score_BK.reshape(-1, 1))
    total_BF = total_NV.reshape([images, keep * vocabulary])  # F: all continuations of all beams
    if do_sample:
        _, index_BC = paddle.topk(total_BF + gumbel_noise(total_BF), 2 * keep, axis=1)
        score_BC = paddle.take_along_axis(total_BF, index_BC, axis=1)
    else:
        score_BC, index_BC = paddle.topk(total_BF, 2 * keep, axis=1)
    index_BC = index_BC.numpy()
    return score_BC.numpy(), index_BC // vocabulary, index_BC % vocabulary
