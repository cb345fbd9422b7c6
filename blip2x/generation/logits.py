"""Changes to the next token's scores before one is chosen: pure functions, each [N, V] -> [N, V].

Scores are raw logits in greedy decoding and sampling, log-probabilities in beam search, as in Hugging Face transformers 4.57.
N rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from blip2x.generation.settings import GenerationSettings

_BLOCK = 32  # tokens of which the best one is looked at first
_LOWEST = np.float32(-80)  # exp of this adds nothing to a sum of 1 and more; lower ones are denormal, and slow


def log_sum_exp(logits_NV: Tensor) -> Tensor:
    """What is taken from logits to make log-probabilities of them, [N, 1].

    On a CPU in NumPy, row by row, which stays in the processor's cache: there paddle's log_softmax takes half a second for a
    row of 50,000 (3.3.1), and its logsumexp ten times as long as this.
    """
    if not logits_NV.place.is_cpu_place():
        return paddle.logsumexp(logits_NV, axis=1, keepdim=True)
    logits = logits_NV.numpy()
    peak_N1, sum_N1 = logits.max(axis=1, keepdims=True), np.empty((len(logits), 1), np.float32)
    for row, peak, total in zip(logits, peak_N1, sum_N1, strict=True):
        np.subtract(row, peak, out=row)
        np.maximum(row, _LOWEST, out=row)
        np.exp(row, out=row)
        total[:] = row.sum()
    return paddle.to_tensor(peak_N1 + np.log(sum_N1))


def best(scores_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row and their tokens, [N, C] each, best first; C is less in a small vocabulary.

    On a CPU in NumPy, where paddle's topk takes three times as long as the head's matrix product: the best tokens are in the
    blocks with the best tokens.
    """
    count = min(count, scores_NV.shape[1])
    if not scores_NV.place.is_cpu_place():
        return paddle.topk(scores_NV, count, axis=1)
    scores = scores_NV.numpy()
    rows, words = scores.shape
    blocks = words // _BLOCK
    token_NC = np.broadcast_to(np.arange(words), (rows, words))
    if blocks > count:
        whole = blocks * _BLOCK
        peak_NB = scores[:, :whole].reshape(rows, _BLOCK, blocks).max(axis=1)  # token t is in block t % blocks
        block_NC = np.argpartition(-peak_NB, count - 1, axis=1)[:, :count]
        inside = (block_NC[:, None] + blocks * np.arange(_BLOCK)[:, None]).reshape(rows, -1)
        token_NC = np.sort(np.concatenate([inside, token_NC[:, whole:]], axis=1), axis=1)
    score_NC = np.take_along_axis(scores, token_NC, axis=1)
    order_NC = np.argsort(-score_NC, axis=1, kind="stable")[:, :count]
    return tuple(paddle.to_tensor(np.take_along_axis(array, order_NC, axis=1)) for array in (score_NC, token_NC))


def process(scores_NV: Tensor, seen_NT: Tensor | None, settings: GenerationSettings, *, length: int, eos_id: int) -> Tensor:
    """Apply all that `settings` asks for, in transformers' order; `length` counts the new tokens so far.

    `seen_NT` are the tokens that the repetition penalty counts: the new ones, and the start token where there is one; None
    will do without a penalty.
    """
    if settings.repetition_penalty != 1 and seen_NT.shape[1]:
        scores_NV = penalize_repetition(scores_NV, seen_NT, settings.repetition_penalty)
    if length < settings.min_new_tokens:
        scores_NV = forbid(scores_NV, eos_id)
    if settings.do_sample:
        # beams need a second token to go on with where the first one ends the text
        at_least = 2 if settings.num_beams > 1 else 1
        if settings.temperature != 1:
            scores_NV = scores_NV / settings.temperature
        if settings.top_k:
            scores_NV = keep_top_k(scores_NV, max(settings.top_k, at_least))
        if settings.top_p < 1:
            scores_NV = keep_top_p(scores_NV, settings.top_p, at_least)
    return scores_NV


def penalize_repetition(scores_NV: Tensor, seen_NT: Tensor, penalty: float) -> Tensor:
    """Make each seen token less likely: positive scores are divided by `penalty`, negative ones multiplied (CTRL, 2019)."""
    seen_score_NT = paddle.take_along_axis(scores_NV, seen_NT, axis=1)
    lower_NT = paddle.where(seen_score_NT < 0, seen_score_NT * penalty, seen_score_NT / penalty)
    return paddle.put_along_axis(scores_NV, seen_NT, lower_NT, axis=1)


def forbid(scores_NV: Tensor, token: int) -> Tensor:
    """Score -inf for one token."""
    token_N1 = paddle.full([scores_NV.shape[0], 1], token, "int64")
    never_N1 = paddle.full([scores_NV.shape[0], 1], -float("inf"), scores_NV.dtype)
    return paddle.put_along_axis(scores_NV, token_N1, never_N1, axis=1)


def keep_top_k(scores_NV: Tensor, k: int) -> Tensor:
    """Score -inf for all but the k best tokens; ties of the last one stay."""
    best_NK, _ = best(scores_NV, k)
    return _keep(scores_NV, scores_NV >= best_NK[:, -1:])


def keep_top_p(scores_NV: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Score -inf outside the nucleus, the smallest set of tokens whose probability reaches p (Holtzman et al., 2020).

    On a CPU in NumPy, where paddle needs 6 ms to sort a row of 50,000: only tokens that can be in the nucleus are sorted. All
    with less than (1 - p) / V together have less than 1 - p, so that the others reach p without them.
    """
    if scores_NV.place.is_cpu_place():
        scores = scores_NV.numpy()
        kept = np.full_like(scores, -np.inf)
        for row, out in zip(scores, kept, strict=True):
            weight = np.exp(np.maximum(row - row.max(), _LOWEST))
            weight /= weight.sum()
            likely = np.flatnonzero(weight >= (1 - p) / len(row))
            likely = likely[np.argsort(-row[likely], kind="stable")]
            before = np.cumsum(weight[likely], dtype=np.float64) - weight[likely]
            inside = likely[before < p]
            if len(inside) < at_least:
                inside = np.argsort(-row, kind="stable")[:at_least]
            out[inside] = row[inside]
        return paddle.to_tensor(kept)
    order_NV = paddle.argsort(scores_NV, axis=1, descending=True)
    sorted_NV = paddle.take_along_axis(scores_NV, order_NV, axis=1)
    probability_NV = F.softmax(sorted_NV, axis=1)
    before_NV = paddle.cumsum(probability_NV, axis=1) - probability_NV
    kept_NV = _keep(sorted_NV, (before_NV < p) | (paddle.arange(scores_NV.shape[1]) < at_least))
    return paddle.put_along_axis(scores_NV, order_NV, kept_NV, axis=1)


def gumbel_noise(scores: Tensor) -> Tensor:
    """Noise whose addition makes the k largest sums a draw of k tokens by probability, without replacement."""
    return -paddle.log(-paddle.log(paddle.rand(scores.shape)))


def _keep(scores_NV: Tensor, kept_NV: Tensor) -> Tensor:
    return paddle.where(kept_NV, scores_NV, paddle.full([], -float("inf"), scores_NV.dtype))
