"""Frozen matrices kept in fewer bytes than they are multiplied in: bfloat16, or int8 with a scale per output.

Only weights are rounded, and products compute in the type of what is multiplied (weight-only quantisation). A matrix is brought
to that type piece by piece while it is used, so that never a whole copy of it exists; the pieces' products are added up and
scaled in float32. With few rows, as in decoding, that takes little: a product then waits for memory, and there is less to read.

Paddle's own `paddle.nn.quant.weight_only_linear` has no CPU kernel (3.3.1). Its GPU kernels take another layout, are made for
half-precision inputs, and are not used here; the code below is the same on both.

D inputs, M outputs, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.models.linear import linear

_AT_ONCE = 1 << 21  # numbers of a piece: 8 MB of float32
_LARGEST = 127  # of int8; -128 is left out, so that a matrix and its negative round alike


@dataclass(frozen=True)
class Compact:
    """How a parameter is kept.

    Attributes:
        outputs: the axis along which each entry has a scale.
        scale: float32, what int8 numbers are multiplied by; None: there is none, for bfloat16.
        computes: name of the number type that the matrix would have otherwise.
    """

    outputs: int
    scale: Tensor | None
    computes: str


def compact_of(weight: Tensor) -> Compact | None:
    """How `weight` is kept; None: as it is multiplied."""
    return getattr(weight, "compact", None)


def type_of(weight: Tensor) -> paddle.dtype:
    """In which type a part computes that has `weight`."""
    compact = compact_of(weight)
    return weight.dtype if compact is None else getattr(paddle, compact.computes)


class CompactLinear(nn.Layer):
    """In the place of a linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., M]."""
        return linear_of(hidden, self.weight, self.bias)


class CompactEmbedding(nn.Layer):
    """In the place of an embedding."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., D]."""
        return embedding(ids, self.weight)


def linear_of(hidden: Tensor, weight_DM: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """[..., D] -> [..., M] as `blip2x.models.linear.linear`, however the weight is kept."""
    compact = compact_of(weight_DM)
    if compact is None:
        return linear(hidden, weight_DM, bias_M)
    inputs, outputs = weight_DM.shape
    total, step, unit = None, max(1, _AT_ONCE // outputs), _unit(hidden, compact)
    for start in range(0, inputs, step):
        product = paddle.matmul(hidden[..., start : start + step], _piece(weight_DM[start : start + step], hidden, unit))
        exact = product.astype("float32")
        total = exact if total is None else total + exact
    total = _scaled(total, compact, unit).astype(product.dtype)
    return total if bias_M is None else total + bias_M


def linear_of_words(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """[..., D] -> [..., V]: word embeddings as a head, however they are kept."""
    compact = compact_of(weight_VD)
    if compact is None:
        return paddle.matmul(hidden, weight_VD, transpose_y=True)
    words, inputs = weight_VD.shape
    step, unit = max(1, _AT_ONCE // inputs), _unit(hidden, compact)
    pieces = (_piece(weight_VD[start : start + step], hidden, unit) for start in range(0, words, step))
    logits = paddle.concat([paddle.matmul(hidden, piece, transpose_y=True) for piece in pieces], axis=-1)
    return _scaled(logits.astype("float32"), compact, unit).astype(logits.dtype)


def _unit(hidden: Tensor, compact: Compact) -> float:
    """What stands for 1 in a product: of numbers up to 127, sums are beyond the range of float16 soon.

    A power of two rounds nothing, so the pieces are divided by it, not `hidden`, whose small numbers float16 would lose.
    """
    is_low = paddle.is_autocast_enabled() or hidden.dtype != paddle.float32
    return 2.0**-7 if is_low and compact.scale is not None else 1.0


def _piece(weight: Tensor, hidden: Tensor, unit: float) -> Tensor:
    piece = weight.astype(hidden.dtype)
    return piece if unit == 1 else piece * unit


def _scaled(total: Tensor, compact: Compact, unit: float) -> Tensor:
    """Float32, as `total` is."""
    return total if compact.scale is None else total * (compact.scale / unit)


def embedding(ids: Tensor, weight_VD: Tensor) -> Tensor:
    """[...] -> [..., D] as ``F.embedding``, however the weight is kept."""
    compact, found = compact_of(weight_VD), F.embedding(ids, weight_VD)
    if compact is None:
        return found
    if compact.scale is None:
        return found.astype(compact.computes)
    return (found.astype("float32") * F.embedding(ids, compact.scale.unsqueeze(1))).astype(compact.computes)


def quantise(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of real numbers as int8, and the float32 scale of each row: its largest number becomes 127 or -127."""
    exact = array.astype(np.float32)
    scale = np.abs(exact).max(axis=1, initial=0) / _LARGEST
    with np.errstate(invalid="ignore"):  # the scale tells of numbers that are none
        exact /= np.where(scale > 0, scale, 1)[:, None]
        return np.rint(exact, out=exact).astype(np.int8), scale


def keep_compact(layer: nn.Layer, dtype: str, *, outputs: int) -> None:
    """Put a parameter of another type in the place of the layer's weight, without memory; `fill` gives it its numbers."""
    old = layer.weight
    with paddle.LazyGuard():
        new = layer.create_parameter(list(old.shape), dtype=dtype)
    vars(new).update(vars(old))  # its share in tensor parallelism
    new.stop_gradient = True
    scale = paddle.empty([old.shape[outputs]], dtype="float32") if dtype == "int8" else None
    new.compact = Compact(outputs, scale, str(old.dtype).removeprefix("paddle."))
    layer.weight = new
