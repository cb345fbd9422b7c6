"""Compute a layer's inside again in the backward pass instead of keeping it."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor, nn
from paddle.distributed.fleet.utils import recompute


def call(layer: nn.Layer, hidden: Tensor, *, again: bool, **others: Any) -> Any:
    """``layer(hidden, **others)``; with `again` only what goes in and comes out is kept for the backward pass.

    Without a backward pass to come (evaluation, decoding, or nothing that is trained at or before this layer) `again` changes
    nothing. The layer's mode does not tell: a frozen language model stays in evaluation mode, and gradients go through it.
    Dropout draws the same numbers again.
    """
    if again and _has_gradient(layer, hidden, *others.values()):
        # The reentrant way, paddle's default, trains nothing where the layer's input needs no gradient.
        return recompute(layer, hidden, use_reentrant=False, **others)
    return layer(hidden, **others)


def _has_gradient(layer: nn.Layer, *values: Any) -> bool:
    if not paddle.is_grad_enabled():
        return False
    inputs = [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]
    tensors = (tensor for tensor in inputs if isinstance(tensor, Tensor))
    return not (all(t.stop_gradient for t in tensors) and all(p.stop_gradient for p in layer.parameters()))
