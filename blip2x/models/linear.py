"""Linear layers whose biases are trained without Paddle's slow sum over rows.

N rows (all axes but the last), D inputs, M outputs.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer


class Linear(nn.Linear):
    """As ``paddle.nn.Linear``, and so for all that asks for one, but through `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., M]."""
        return linear(input, self.weight, self.bias)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., D], [D, M], [M] -> [..., M], as ``F.linear``."""
    if _is_slow(inputs, bias):
        return add_bias(paddle.matmul(inputs, weight), bias)
    return F.linear(inputs, weight, bias)


def add_bias(hidden: Tensor, bias: Tensor) -> Tensor:
    """[..., M] + [M]; on a CPU the bias's gradient is a product with ones: the same sum, about twenty times as fast.

    Where `hidden` needs a gradient, too, there is no second derivative then.
    """
    return _AddBias.apply(hidden, bias) if _is_slow(hidden, bias) and not hidden.stop_gradient else hidden + bias


def _is_slow(hidden: Tensor, bias: Tensor | None) -> bool:
    trained = bias is not None and not bias.stop_gradient and paddle.is_grad_enabled()
    return trained and hidden.place.is_cpu_place() and paddle.in_dynamic_mode()


class _AddBias(PyLayer):
    @staticmethod
    def forward(ctx, hidden: Tensor, bias: Tensor) -> Tensor:
        return hidden + bias

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows_NM = grad.flatten(stop_axis=-2) if grad.ndim > 1 else grad.unsqueeze(0)
        ones_1N = paddle.ones([1, rows_NM.shape[0]], dtype=grad.dtype)
        return grad, paddle.matmul(ones_1N, rows_NM).squeeze(0)
