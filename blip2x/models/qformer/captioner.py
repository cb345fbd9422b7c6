"""Captions from the Q-Former alone, as stage 1 trains it to write them.

B images, N rows of a decoding batch, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
from paddle import Tensor

from blip2x.models.cached_attention import Look, SharedCache
from blip2x.models.qformer.qformer import Cache, QFormer


class QFormerCaptioner:
    """The Q-Former as a decoder: its prefix is the cache of an image pass, its first token [DEC].

    The state holds the keys and values of queries and tokens so far.
    """

    def __init__(self, qformer: QFormer, *, dec_id: int):
        self.qformer = qformer
        self.start_id = dec_id

    @paddle.no_grad()
    def prefill(self, prefix: Cache) -> tuple[Tensor, SharedCache]:
        """Read [DEC] behind the queries: float32 logits [B, V] of the first token, and the state."""
        images, heads, queries, _ = prefix[0][0].shape
        cache = SharedCache(prefix, np.ones((images, queries), bool), heads=heads)
        return self._write(paddle.full([images], self.start_id, dtype="int64"), 0, cache.append(ahead=False)), cache

    @paddle.no_grad()
    def step(self, token_N: Tensor, state: SharedCache) -> tuple[Tensor, SharedCache]:
        """Append one token per row: float32 logits [N, V] of the next one, and the new state."""
        return self._write(token_N, state.written, state.append()), state

    def reorder(self, state: SharedCache, index_N: np.ndarray) -> SharedCache:
        """Keep the rows `index_N`, which may repeat."""
        return state.reorder(index_N)

    def _write(self, token_N: Tensor, position: int, look: Look) -> Tensor:
        qformer = self.qformer
        hidden_ND = qformer.embeddings_norm(qformer.text.embed(token_N.unsqueeze(1), first=position)[:, 0])
        bias = look.bias(qformer.query_tokens.dtype)
        for place, layer in enumerate(qformer.layers):
            attention = layer.attention
            query_ND = attention.query(hidden_ND)
            scale = 1 / math.sqrt(query_ND.shape[1] // attention.num_heads)
            look.write(place, attention.key(hidden_ND), attention.value(hidden_ND))
            hidden_ND = attention.norm(hidden_ND + attention.out(look.read(place, query_ND * scale, bias)))
            hidden_ND = layer.text_ffn(hidden_ND)
        return qformer.text.logits(hidden_ND).astype("float32")
