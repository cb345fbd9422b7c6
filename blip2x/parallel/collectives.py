"""Gathering tensors from the ranks of a group, with and without gradient."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer


def gather(tensor: Tensor, group: Any = None, *, axis: int = 0) -> Tensor:
    """The tensors of all ranks of `group` (None: of all), of equal shapes, put together along `axis` in rank order."""
    parts: list[Tensor] = []
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return paddle.concat(parts, axis=axis)


def summed(tensor: Tensor, group: Any = None) -> Tensor:
    """Sum of the tensors of all ranks of `group` (None: of all)."""
    total = tensor.clone()  # all_reduce writes into its argument, which others may hold
    dist.all_reduce(total, group=group)
    return total


class GatherWithGrad(PyLayer):
    """`gather` whose gradient goes back to the rank that a row came from, summed over the ranks that used it.

    With losses averaged over ranks this gives the gradient of one process that sees the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any, rank: int) -> Tensor:
        """Gather along the first axis; `rank` is this one's place in `group`."""
        ctx.group, ctx.first, ctx.rows = group, rank * tensor.shape[0], tensor.shape[0]
        return gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Sum over ranks and keep the own rows; all_reduce, as gloo has no reduce_scatter."""
        return summed(grad, ctx.group)[ctx.first : ctx.first + ctx.rows]
