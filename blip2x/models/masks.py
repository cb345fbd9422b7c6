"""Attention masks as numbers that are added to the scores."""

from __future__ import annotations

import paddle
from paddle import Tensor


def attention_bias(visible: Tensor, dtype: paddle.dtype) -> Tensor:
    """What is added to attention scores: 0 where `visible`, else so low that softmax gives 0.

    Half the type's minimum: adding a score cannot overflow to -inf, so rows that see nothing (padding) stay finite.
    """
    hidden = paddle.full([], paddle.finfo(dtype).min / 2, dtype=dtype)
    return paddle.where(visible, paddle.zeros([], dtype=dtype), hidden)


def for_all_heads(bias: Tensor, heads: int, queries: int) -> Tensor:
    """`bias` [B or 1, 1, 1 or T, S] written out for all heads and queries, [B or 1, heads, queries, S].

    Once for all layers: on a CPU paddle adds two tensors of one shape about eight times faster than it broadcasts.
    """
    return bias.expand([bias.shape[0], heads, queries, bias.shape[3]])


def causal(length: int) -> Tensor:
    """Which keys a query may see, bool [1, 1, length, length]: itself and those before."""
    position = paddle.arange(length)
    return (position.unsqueeze(0) <= position.unsqueeze(1)).unsqueeze([0, 1])
