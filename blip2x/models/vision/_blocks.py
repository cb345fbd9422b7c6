"""What EVA's and CLIP's vision transformers share (Dosovitskiy et al., 2021, arXiv 2010.11929).

B images, C colours, S pixels of a side, P patches and the class token, D width, H heads, W width of one head, M MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.errors import UserError
from blip2x.models.compact import linear_of
from blip2x.models.linear import Linear
from blip2x.models.recompute import call
from blip2x.models.tensor_parallel import RowLinear, copy_for_ranks, keep_share, split_columns
from blip2x.parallel.context import TensorGroup


class InitialStd(NamedTuple):
    """Standard deviations that a block's matrices are drawn with."""

    qkv: float
    out: float
    fc1: float
    fc2: float


def drawn(std: float) -> paddle.ParamAttr:
    """A parameter that starts truncated normal; an attribute, so that ``paddle.LazyGuard`` can put the drawing off."""
    return paddle.ParamAttr(initializer=nn.initializer.TruncatedNormal(std=std))


def zeros() -> paddle.ParamAttr:
    """A parameter that starts at 0."""
    return paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))


def drop_path(branch_BPD: Tensor, rate: float, *, training: bool) -> Tensor:
    """Stochastic depth: leave a sample's whole branch out with probability `rate`, and enlarge those that stay."""
    if rate == 0 or not training:
        return branch_BPD
    keep_B11 = F.dropout(paddle.ones([branch_BPD.shape[0], 1, 1], dtype=branch_BPD.dtype), rate)
    return branch_BPD * keep_B11


class PatchEmbedding(nn.Layer):
    """Project every patch, put the class token before them and add learned positions.

    Args:
        image_size: pixels of a side.
        patch_size: pixels of a patch's side.
        width: of the features.
        bias: whether the projection has one.
        std: what projection, class token and positions are drawn with.

    Raises:
        UserError: the patches do not cover the image exactly.
    """

    def __init__(self, *, image_size: int, patch_size: int, width: int, bias: bool, std: float):
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"image_size {image_size} of the image encoder is no multiple of its patch_size {patch_size}")
        self.projection = nn.Conv2D(
            3, width, patch_size, stride=patch_size, weight_attr=drawn(std), bias_attr=zeros() if bias else False
        )
        self.class_token = self.create_parameter([1, 1, width], attr=drawn(std))
        self.positions = self.create_parameter([1, 1 + (image_size // patch_size) ** 2, width], attr=drawn(std))

    def forward(self, image_BCSS: Tensor) -> Tensor:
        """Images of the size that the positions were made for; features [B, P, D], class token first."""
        patch_BPD = self.projection(image_BCSS).flatten(start_axis=2).transpose([0, 2, 1])
        token_B1D = self.class_token.expand([patch_BPD.shape[0], -1, -1])
        # In mixed precision the sum over the blocks is kept in the parameters' precision, not in the projection's.
        return paddle.concat([token_B1D, patch_BPD.astype(token_B1D.dtype)], axis=1) + self.positions


class Attention(nn.Layer):
    """Multi-head self-attention with packed queries, keys and values.

    Without `key_bias` there are biases for queries and values only: a key's bias adds the same to all scores of a query, which
    softmax does not see.
    """

    def __init__(self, *, width: int, num_heads: int, key_bias: bool, std: InitialStd):
        super().__init__()
        if width % num_heads:
            raise UserError(f"width {width} of the image encoder is no multiple of its num_heads {num_heads}")
        self.num_heads, self.head_width = num_heads, width // num_heads
        self.qkv = Linear(width, 3 * width, weight_attr=drawn(std.qkv), bias_attr=zeros() if key_bias else False)
        self.query_bias = None if key_bias else self.create_parameter([width], attr=zeros())
        self.value_bias = None if key_bias else self.create_parameter([width], attr=zeros())
        self.out = Linear(width, width, weight_attr=drawn(std.out), bias_attr=zeros())

    def forward(self, hidden_BPD: Tensor) -> Tensor:
        """Every position gathers from all."""
        rows, length, _ = hidden_BPD.shape
        bias = self.qkv.bias
        if bias is None:
            bias = paddle.concat([self.query_bias, paddle.zeros_like(self.query_bias), self.value_bias])
        qkv_BP3HW = linear_of(hidden_BPD, self.qkv.weight, bias).reshape([rows, length, 3, self.num_heads, self.head_width])
        # On a CPU this is the plain formula, queries scaled before the product and no slower; on a GPU a fused kernel.
        mixed_BPHW = F.scaled_dot_product_attention(*qkv_BP3HW.unbind(axis=2))
        return self.out(mixed_BPHW.flatten(start_axis=2))

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of the heads."""
        self.num_heads //= group.size
        split_columns(self.qkv, group, blocks=3)
        keep_share(self, "query_bias", 0, group)
        keep_share(self, "value_bias", 0, group)
        self.out = RowLinear(self.out, group)


class Block(nn.Layer):
    """Attention and a two-layer MLP, each behind a norm and beside a residual connection."""

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        mlp_width: int,
        key_bias: bool,
        activation: Callable[[Tensor], Tensor],
        epsilon: float,
        drop_path_rate: float,
        std: InitialStd,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, epsilon=epsilon)
        self.attention = Attention(width=width, num_heads=num_heads, key_bias=key_bias, std=std)
        self.norm2 = nn.LayerNorm(width, epsilon=epsilon)
        self.fc1 = Linear(width, mlp_width, weight_attr=drawn(std.fc1), bias_attr=zeros())
        self.fc2 = Linear(mlp_width, width, weight_attr=drawn(std.fc2), bias_attr=zeros())
        self.activation = activation
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_BPD: Tensor) -> Tensor:
        """The next block's input."""
        hidden_BPD = hidden_BPD + self._drop(self.attention(self.norm1(hidden_BPD)))
        inner_BPM = self.activation(self.fc1(self.norm2(hidden_BPD)))
        return hidden_BPD + self._drop(self.fc2(inner_BPM))

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of heads and hidden units."""
        copy_for_ranks(self.norm1, group)
        self.attention.split_over(group)
        copy_for_ranks(self.norm2, group)
        split_columns(self.fc1, group)
        self.fc2 = RowLinear(self.fc2, group)

    def _drop(self, branch_BPD: Tensor) -> Tensor:
        return drop_path(branch_BPD, self.drop_path_rate, training=self.training)


class Blocks(nn.LayerList):
    """Blocks one after the other; with `recompute` only their inputs are kept for the backward pass when they are trained."""

    def __init__(self, blocks: Iterable[Block], *, recompute: bool):
        super().__init__(blocks)
        self.recompute = recompute

    def forward(self, hidden_BPD: Tensor) -> Tensor:
        """The last block's output, which no norm follows."""
        for block in self:
            hidden_BPD = call(block, hidden_BPD, again=self.recompute and self.training)
        return hidden_BPD

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of every block; before the blocks have memory (`tensor_parallel`)."""
        for block in self:
            block.split_over(group)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, rising linearly from 0 to `last`; a single block has 0."""
    return [last * index / max(depth - 1, 1) for index in range(depth)]
