"""Dropout whose numbers are drawn several times as fast as Paddle does on a CPU.

Paddle takes 13 ns there to draw a number, more than a linear layer takes to compute one of its outputs.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor
from paddle.autograd import PyLayer

_STEPS = 2**16  # a rate is rounded to one of them


def dropout(hidden: Tensor, rate: float, *, training: bool) -> Tensor:
    """As ``F.dropout``: in training, zeros in a share `rate` of the places, and the others divided by 1 - `rate`.

    On a CPU, Paddle's generator gives no more than the seed of another one that draws the places. So what restores its state,
    when a run goes on or a pass is computed again, has the same places drawn.
    """
    if not (training and rate):
        return hidden
    if paddle.in_dynamic_mode() and hidden.place.is_cpu_place():  # a graph that is being compiled has no places
        return _Dropout.apply(hidden, rate)
    return F.dropout(hidden, rate)


class _Dropout(PyLayer):
    @staticmethod
    def forward(ctx, hidden: Tensor, rate: float) -> Tensor:
        dropped = round(rate * _STEPS)
        kept, ctx.factor = _places(hidden.shape, dropped), _STEPS / (_STEPS - dropped)
        ctx.save_for_backward(kept)
        return _scaled(hidden, kept, ctx.factor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _scaled(grad, *ctx.saved_tensor(), ctx.factor)


def _places(shape: list[int], dropped: int) -> Tensor:
    """Where to keep the numbers, a byte each; `dropped` of `_STEPS` are not kept."""
    seed = paddle.randint(0, 2**31 - 1, [2], dtype="int32").numpy()
    count = math.prod(shape)
    words = np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return paddle.to_tensor((words >= dropped).reshape(shape))


def _scaled(hidden: Tensor, kept: Tensor, factor: float) -> Tensor:
    return kept.astype(hidden.dtype).multiply_(hidden).scale_(factor)
