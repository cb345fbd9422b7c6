"""Where the queries look: how they divide their attention among an image's patches.

Shown is the last layer that looks at the image. Between it and the language model is, in the paper's layout, a single other
self-attention, in which queries exchange what they have; what earlier layers gathered has been mixed among the queries several
times since, so that their looks say little about a single query's output. Heads are averaged: their outputs are added up by one
projection, and none has a rank before the others.

This is raw attention: the weights of a sum, and no proof of what an answer rests on. It leaves out how large the values are
that are summed, what the residual connection brings along, and what the language model makes of the queries. And a patch's
feature is no longer about its own pixels alone, for the image encoder lets every patch read all others; large ones are known to
keep notes about the whole image in patches of empty background. A bright patch says from where something was taken, not what.

B rows, H heads, Q queries, P the class token and the patches behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paddle import Tensor

from blip2x.models.qformer.layers import Attention
from blip2x.models.qformer.qformer import QFormer


@contextmanager
def watch_queries(qformer: QFormer) -> Iterator[list[Tensor]]:
    """Inside, each pass in which queries look at images appends their shares to the list that is given.

    Shares are float32 [B, Q, P]: of each query, a sum of 1 over the class token and the patches, the mean over the heads of the
    last cross-attention. They are computed beside the pass, which stays as it is; outside of the context nothing is.
    """
    seen: list[Tensor] = []

    def look(layer: Attention, inputs: tuple[Any, ...]) -> None:
        query_BQD, (key_BHPW, _), _ = inputs
        seen.append(layer.shares(query_BQD, key_BHPW).astype("float32").mean(axis=1).detach())

    last = [layer.cross_attention for layer in qformer.layers if layer.cross_attention is not None][-1]
    hook = last.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()
