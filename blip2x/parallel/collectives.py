"""Gathering tensors from the ranks of a group, with and without gradient."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer


def gather(tensor: Tensor, group: Any = None) -> Tensor:
    """[B, ...] of each rank of `group` (None: of all) -> [size * B, ...] in rank order; B must be the same everywhere."""
    parts: list[Tensor] = []
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return paddle.concat(parts, axis=0)


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
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.first : ctx.first + ctx.rows]
