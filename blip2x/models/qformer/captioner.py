"""Captions from the Q-Former alone, as stage 1 trains it to write them.

B images, N rows of a decoding batch, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import paddle
from paddle import Tensor

from blip2x.models.qformer.qformer import Cache, QFormer


class CaptionState(NamedTuple):
    """Keys and values of queries and tokens so far, and how many tokens these are."""

    cache: Cache
    length: int


class QFormerCaptioner:
    """The Q-Former as a decoder: its prefix is the cache of an image pass, its first token [DEC]."""

    def __init__(self, qformer: QFormer, *, dec_id: int):
        self.qformer = qformer
        self.start_id = dec_id

    def prefill(self, prefix: Cache) -> tuple[Tensor, CaptionState]:
        """Read [DEC] behind the queries: float32 logits [B, V] of the first token, and the state."""
        start_B = paddle.full([prefix[0][0].shape[0]], self.start_id, dtype="int64")
        return self.step(start_B, CaptionState(prefix, 0))

    def step(self, token_N: Tensor, state: CaptionState) -> tuple[Tensor, CaptionState]:
        """Append one token per row: float32 logits [N, V] of the next one, and the new state."""
        ids_N1 = token_N.unsqueeze(1)
        logits_N1V, cache = self.qformer.write(ids_N1, paddle.ones_like(ids_N1), state.cache, first=state.length)
        return logits_N1V[:, 0].astype("float32"), CaptionState(cache, state.length + 1)

    def reorder(self, state: CaptionState, index_N: Tensor) -> CaptionState:
        """Keep the rows `index_N`, which may repeat."""
        cache = [tuple(paddle.index_select(tensor, index_N, axis=0) for tensor in pair) for pair in state.cache]
        return CaptionState(cache, state.length)
