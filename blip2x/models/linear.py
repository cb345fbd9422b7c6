"""Linear layers that add their biases inside the matrix product, and sum their gradients by one.

Paddle's CPU kernels take a quarter of a linear layer's time to add a bias to each row, and longer to sum its gradient over the
rows.

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


def use_linear(layer: nn.Layer) -> None:
    """Have the linear layers inside `layer`, which a library made, compute as `Linear` does; their parameters stay."""
    for part in layer.sublayers():
        if type(part) is nn.Linear:
            part.__class__ = Linear  # a new one would draw weights that nobody needs


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., D], [D, M], [M] -> [..., M], as ``F.linear``; on a CPU there is no second derivative."""
    if bias is None or not _has_own_way(inputs, weight, bias):
        return F.linear(inputs, weight, bias)
    if paddle.is_grad_enabled() and not (inputs.stop_gradient and weight.stop_gradient and bias.stop_gradient):
        return _Linear.apply(inputs, weight, bias)
    return _product(inputs, weight, bias)


def add_bias(hidden: Tensor, bias: Tensor) -> Tensor:
    """[..., M] + [M]; on a CPU the gradient of a trained bias is a product with ones, and there is no second derivative."""
    trained = paddle.is_grad_enabled() and not (hidden.stop_gradient or bias.stop_gradient)
    return _AddBias.apply(hidden, bias) if trained and _has_own_way(hidden, bias) else hidden + bias


def _has_own_way(*tensors: Tensor) -> bool:
    # Other types are a GPU's; a graph that is being compiled has no places.
    alike = all(tensor.dtype == paddle.float32 for tensor in tensors)
    return alike and paddle.in_dynamic_mode() and tensors[0].place.is_cpu_place()


def _product(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows_NM = paddle.addmm(bias.unsqueeze(0), _rows(inputs), weight)
    return rows_NM.reshape([*inputs.shape[:-1], weight.shape[1]])


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape([-1, hidden.shape[-1]])


def _sum_of_rows(grad: Tensor) -> Tensor:
    """[..., M] -> [M]; as a product about twenty times as fast as Paddle's sum."""
    rows_NM = _rows(grad)
    return paddle.matmul(paddle.ones([1, rows_NM.shape[0]], dtype=grad.dtype), rows_NM).squeeze(0)


class _Linear(PyLayer):
    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.wanted = [not tensor.stop_gradient for tensor in (inputs, weight, bias)]
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensor()
        of_inputs, of_weight, of_bias = ctx.wanted
        return (
            paddle.matmul(grad, weight, transpose_y=True) if of_inputs else None,
            paddle.matmul(_rows(inputs), _rows(grad), transpose_x=True) if of_weight else None,
            _sum_of_rows(grad) if of_bias else None,
        )


class _AddBias(PyLayer):
    @staticmethod
    def forward(ctx, hidden: Tensor, bias: Tensor) -> Tensor:
        rows_NM = _rows(hidden)
        ones_N1 = paddle.ones([rows_NM.shape[0], 1], dtype=hidden.dtype)
        return paddle.addmm(rows_NM, ones_N1, bias.unsqueeze(0)).reshape(hidden.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, _sum_of_rows(grad)
