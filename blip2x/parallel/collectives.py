"""Gathering tensors from all ranks, with and without gradient."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer


def gather(tensor: Tensor) -> Tensor:
    """[B, ...] of each rank -> [world_size * B, ...] in rank order; B must be the same everywhere."""
    parts: list[Tensor] = []
    dist.all_gather(parts, tensor.contiguous())
    return paddle.concat(parts, axis=0)


class GatherWithGrad(PyLayer):
    """`gather` whose gradient goes back to the rank that a row came from, summed over the ranks that used it.

    With losses averaged over ranks this gives the gradient of one process that sees the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Gather along the first axis."""
        ctx.rows = tensor.shape[0]
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Sum over ranks and keep the own rows; all_reduce, as gloo has no reduce_scatter."""
        grad = grad.clone()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]
