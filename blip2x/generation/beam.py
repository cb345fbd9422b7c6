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

from blip2x.generation.logits import best, gumbel_noise, log_sum_exp, process
from blip2x.generation.protocol import Decoder
from blip2x.generation.sample import seen_tokens
from blip2x.generation.settings import GenerationSettings

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
    over_B = ~(beams.score_BK[:, :1] / scale > worst_BK).any(axis=1) | _is_settled(beams, scale, settings)
    return over_B | beams.has_ended_BK.all(axis=1) if settings.early_stopping else over_B


def _is_settled(beams: Beams, scale: np.float32, settings: GenerationSettings) -> np.ndarray:
    """No live text can come before the ended ones that will be returned, so that more steps would change nothing [B].

    Log-probabilities are at most 0, and what `process` makes of them is, too: a sum only falls. Divided by a power of the
    length it is highest at the greatest length, or here and now if the exponent is not above 0. An ended text stays before an
    equal one.
    """
    if settings.do_sample:  # an image that is left out earlier would change what is drawn for the others
        return np.zeros(len(beams.score_BK), bool)
    if settings.length_penalty > 0:
        scale = np.float32(settings.max_new_tokens**settings.length_penalty)
    last = settings.num_return_sequences - 1
    return beams.has_ended_BK[:, last] & (beams.ended_score_BK[:, last] >= beams.score_BK[:, 0] / scale)


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
    row_BK = np.repeat(image_B[:, None], keep, axis=1)  # each beam's row in the state: an image has one until beams differ
    logits_NV = logits_BV
    for length in range(1, steps + 1):
        seen_NT = None
        if settings.repetition_penalty != 1:
            own_NT = beams.ids_BKT[:, : logits_NV.shape[0] // len(image_B)].reshape(-1, steps)
            seen_NT = seen_tokens(own_NT[:, : length - 1], start_id)
        likeliest = _likeliest(logits_NV, seen_NT, settings, length=length - 1, eos_id=eos_id)
        candidates = _candidates(beams.score_BK, *likeliest)
        beams, parent_BK, is_over_B = advance(beams, *candidates, length=length, settings=settings, eos_id=eos_id)
        if length == steps:
            is_over_B[:] = True
        for name in ("ended_ids_BKT", "ended_score_BK"):
            getattr(done, name)[image_B[is_over_B]] = getattr(beams, name)[is_over_B]
        if is_over_B.all():
            break
        row_N = np.take_along_axis(row_BK, parent_BK, axis=1)[~is_over_B].reshape(-1)
        image_B, beams = image_B[~is_over_B], beams.rows(~is_over_B)
        if not np.array_equal(row_N, np.arange(logits_NV.shape[0])):
            state = decoder.reorder(state, row_N)
        row_BK = np.arange(row_N.size).reshape(-1, keep)
        token_N = paddle.to_tensor(beams.ids_BKT[:, :, length - 1].reshape(-1))
        logits_NV, state = decoder.step(token_N, state)
    results = settings.num_return_sequences
    ids = done.ended_ids_BKT[:, :results].reshape(images * results, steps)
    return ids, done.ended_score_BK[:, :results].reshape(-1)


def _likeliest(
    logits_NV: Tensor, seen_NT: Tensor | None, settings: GenerationSettings, *, length: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 2K best (or drawn) tokens of each row, [N, C]: tokens, log-probabilities, and what they are ranked by.

    `length` as in `process`.
    """
    shift_N1 = log_sum_exp(logits_NV)
    if settings.do_sample or settings.repetition_penalty != 1:  # which read log-probabilities of all tokens
        logits_NV, shift_N1 = logits_NV - shift_N1, paddle.zeros_like(shift_N1)
    score_NV = process(logits_NV, seen_NT, settings, length=length, eos_id=eos_id)
    rank_NV = score_NV + gumbel_noise(score_NV) if settings.do_sample else score_NV
    rank_NC, token_NC = best(rank_NV, 2 * settings.num_beams)
    score_NC = paddle.take_along_axis(score_NV, token_NC, axis=1) if settings.do_sample else rank_NC
    return token_NC.numpy(), (score_NC - shift_N1).numpy(), (rank_NC - shift_N1).numpy()


def _candidates(
    score_BK: np.ndarray, token_NC: np.ndarray, logprob_NC: np.ndarray, rank_NC: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 2K best (or drawn) continuations of each image's beams: scores, beams and tokens, [B, C] each.

    N may be B: then all beams of an image go on from the same tokens.
    """
    (images, keep), each = score_BK.shape, token_NC.shape[1]

    def per_image(array_NC: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array_NC.reshape(images, -1, each), (images, keep, each))

    before_BK1 = score_BK[:, :, None]
    index_BC = _best((before_BK1 + per_image(rank_NC)).reshape(images, -1), 2 * keep)
    score_BC, token_BC = (
        np.take_along_axis(array.reshape(images, -1), index_BC, axis=1)
        for array in (before_BK1 + per_image(logprob_NC), per_image(token_NC))
    )
    return score_BC, index_BC // each, token_BC
