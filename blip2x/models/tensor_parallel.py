"""Tensor parallelism of frozen models: a rank keeps its share of every matrix (Shoeybi et al., 2019, arXiv 1909.08053).

Of two matrices one behind the other, the first is split by columns and the second by rows. Between them each rank works on
heads, or hidden units, of its own; one sum over the ranks follows the second. Norms, positions and the biases behind a sum are
whole on every rank. A model is split before it has memory, and `fill` reads the shares:

    with paddle.LazyGuard():
        model = build(...)
    model.split_over(group)
    fill(model, tensors, ...)

B texts, L tokens, D width, M width between the two matrices, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import paddle
from paddle import Tensor, nn

from blip2x.config.model import ModelConfig
from blip2x.errors import UserError
from blip2x.models.compact import embedding, linear_of, linear_of_words
from blip2x.parallel.context import TensorGroup
from blip2x.parallel.tensor_ops import copy_to, gather_from, reduce_from

Where = tuple[slice, ...]


@dataclass(frozen=True)
class Share:
    """Which part of a tensor a rank keeps: one of `size` alike along `axis`.

    With `blocks` the axis is so many tensors one behind the other (queries, keys, values), of each of which the rank keeps its
    part. Where `size` does not divide the axis, the last parts end in padding.
    """

    whole: tuple[int, ...]  # shape of the tensor
    axis: int
    rank: int
    size: int
    blocks: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part, padding included."""
        length = -(-self.whole[self.axis] // (self.blocks * self.size)) * self.blocks
        return (*self.whole[: self.axis], length, *self.whole[self.axis + 1 :])

    @property
    def is_padded(self) -> bool:
        """Whether some rank's part has padding."""
        return self.shape[self.axis] * self.size != self.whole[self.axis]

    def pieces(self) -> Iterator[tuple[Where, Where]]:
        """Where a piece stands in the whole, and where in the part; one for each block, without the padding."""
        block, step = self.whole[self.axis] // self.blocks, self.shape[self.axis] // self.blocks
        first, last = (min(rank * step, block) for rank in (self.rank, self.rank + 1))
        before = (slice(None),) * self.axis
        for i in range(self.blocks):
            yield (*before, slice(i * block + first, i * block + last)), (*before, slice(i * step, i * step + last - first))


def share_of(tensor: Tensor) -> Share | None:
    """What the rank keeps of a parameter that is split; None: it has all of it."""
    return getattr(tensor, "share", None)


def check_split(cfg: ModelConfig, part: str, size: int) -> None:
    """Raise `UserError` where "language" or "vision" of `cfg` is trained, or `size` ranks cannot share it evenly."""
    own = getattr(cfg, part)
    if not own.frozen:
        whole = "parallelism.tp=1" if part == "language" else "parallelism.tp_vision=false"
        raise UserError(
            f"parallelism.tp={size} splits frozen models only, and model.{part}.frozen=false trains this one; set {whole}"
        )
    for name in ("num_heads", "mlp_width"):
        if getattr(own, name) % size:
            raise UserError(
                f"model.{part}.{name}={getattr(own, name)} cannot be shared evenly by parallelism.tp={size} ranks; "
                f"choose a degree that divides it"
            )


def keep_share(layer: nn.Layer, name: str, axis: int, group: TensorGroup, *, blocks: int = 1) -> None:
    """Put this rank's share in the place of parameter `name` of `layer`, without memory; `fill` gives it its numbers."""
    whole = getattr(layer, name)
    if whole is None:
        return
    share = Share(tuple(whole.shape), axis, group.rank, group.size, blocks)
    with paddle.LazyGuard():
        part = layer.create_parameter(list(share.shape), dtype=whole.dtype)
    part.stop_gradient = whole.stop_gradient
    part.share = share
    setattr(layer, name, part)


def split_columns(linear: nn.Linear, group: TensorGroup, *, blocks: int = 1) -> None:
    """Keep some of the outputs [..., M] of `linear`; its input has to go through `copy_for_ranks`."""
    keep_share(linear, "weight", 1, group, blocks=blocks)
    keep_share(linear, "bias", 0, group, blocks=blocks)


def copy_for_ranks(norm: nn.Layer, group: TensorGroup) -> None:
    """Let ranks read the output of `norm` each in its own way: the gradients of what they make of it are summed.

    Once for all that read it, queries, keys and values: one sum instead of three.
    """
    norm.register_forward_post_hook(lambda layer, inputs, output: copy_to(output, group))


class RowLinear(nn.Layer):
    """The second of two matrices: reads the rank's inputs [..., M / size], and gives the sum over the ranks [..., D].

    Args:
        whole: a linear layer without memory, in whose place this one stands.
        group: the ranks.
    """

    def __init__(self, whole: nn.Linear, group: TensorGroup):
        super().__init__()
        self.weight, self.bias, self.group = whole.weight, whole.bias, group
        keep_share(self, "weight", 0, group)

    def forward(self, hidden: Tensor) -> Tensor:
        """The bias, whole on every rank, is added once."""
        total = reduce_from(linear_of(hidden, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class SplitEmbedding(nn.Layer):
    """Word embeddings of which a rank keeps some words.

    Args:
        whole: an embedding without memory, in whose place this one stands.
        group: the ranks.
    """

    def __init__(self, whole: nn.Embedding, group: TensorGroup):
        super().__init__()
        self.weight, self.group = whole.weight, group
        keep_share(self, "weight", 0, group)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Embeddings [B, L, D]: every rank looks its own words up, the others give 0."""
        rows = self.weight.shape[0]
        own_BL = ids_BL - self.group.rank * rows
        known_BL = (own_BL >= 0) & (own_BL < rows)
        found_BLD = embedding(paddle.where(known_BL, own_BL, paddle.zeros_like(own_BL)), self.weight)
        return reduce_from(found_BLD * known_BL.unsqueeze(-1).astype(found_BLD.dtype), self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], where these embeddings are the head, too; the input as that of `split_columns`."""
        return whole_logits(linear_of_words(hidden, self.weight), self.weight, self.group)


class SplitHead(nn.Layer):
    """A head of which a rank keeps some words; the input as that of `split_columns`.

    Args:
        whole: a linear layer without memory and without bias, in whose place this one stands.
        group: the ranks.
    """

    def __init__(self, whole: nn.Linear, group: TensorGroup):
        super().__init__()
        self.weight, self.group = whole.weight, group
        keep_share(self, "weight", 1, group)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return whole_logits(linear_of(hidden, self.weight), self.weight, self.group)


def whole_logits(part: Tensor, weight: Tensor, group: TensorGroup) -> Tensor:
    """Logits of the rank's words, the rows or columns of `weight` -> of all words [..., V], the same on every rank."""
    share = share_of(weight)
    return gather_from(part, group)[..., : share.whole[share.axis]]  # without the padding's
