"""Changes to the next token's scores before one is chosen: pure functions, each [N, V] -> [N, V].

Scores are raw logits in greedy decoding and sampling, log-probabilities in beam search, as in Hugging Face transformers 4.57.
N rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from blip2x.generation.settings import GenerationSettings


def process(scores_NV: Tensor, seen_NT: Tensor, settings: GenerationSettings, *, length: int, eos_id: int) -> Tensor:
    """Apply all that `settings` asks for, in transformers' order; `length` counts the new tokens so far.

    `seen_NT` are the tokens that the repetition penalty counts: the new ones, and the start token where there is one.
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
    is_token_V = paddle.arange(scores_NV.shape[1]) == token
    return paddle.where(is_token_V, paddle.full([], -float("inf"), scores_NV.dtype), scores_NV)


def keep_top_k(scores_NV: Tensor, k: int) -> Tensor:
    """Score -inf for all but the k best tokens; ties of the last one stay."""
    best_NK, _ = paddle.topk(scores_NV, min(k, scores_NV.shape[1]), axis=1)
    return _keep(scores_NV, scores_NV >= best_NK[:, -1:])


def keep_top_p(scores_NV: Tensor, p: float, at_least: int = 1) -> Tensor:
    """Score -inf outside the nucleus, the smallest set of tokens whose probability reaches p (Holtzman et al., 2020)."""
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
