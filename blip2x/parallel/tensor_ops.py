"""What the ranks of a tensor group tell each other inside a model, forward and backward.

A matrix that is split by columns is followed by one that is split by rows. The first reads the same input on every rank
(`copy_to`), the second's results are parts of a sum (`reduce_from`). All ranks work out the same loss, from the same samples.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor
from paddle.autograd import PyLayer

from blip2x.parallel.collectives import gather, summed
from blip2x.parallel.context import TensorGroup


def copy_to(tensor: Tensor, group: TensorGroup) -> Tensor:
    """The tensor itself, before each rank does something else with it; gradients are summed over the ranks."""
    return _CopyTo.apply(tensor, group) if _wants_gradient(tensor) else tensor


def reduce_from(tensor: Tensor, group: TensorGroup) -> Tensor:
    """Sum over the ranks, which go on alike: each one's gradient is the whole one already."""
    return _ReduceFrom.apply(tensor, group)


def gather_from(tensor: Tensor, group: TensorGroup) -> Tensor:
    """[..., V] of each rank -> [..., size * V] in rank order; a rank takes its own part of the gradient."""
    return _GatherFrom.apply(tensor, group)


class _CopyTo(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad, ctx.group.group)


class _ReduceFrom(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        return summed(tensor, group.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _GatherFrom(PyLayer):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: TensorGroup) -> Tensor:
        ctx.first, ctx.width = group.rank * tensor.shape[-1], tensor.shape[-1]
        return gather(tensor, group.group, axis=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[..., ctx.first : ctx.first + ctx.width]


def _wants_gradient(tensor: Tensor) -> bool:
    return paddle.is_grad_enabled() and not tensor.stop_gradient
