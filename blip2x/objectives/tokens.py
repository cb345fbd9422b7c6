"""Means per token over all micro-batches and ranks of an optimizer step, and texts of one length.

M micro-batches, B texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor

from blip2x.parallel.context import Context


def with_token_shares(batches: Sequence[dict[str, Any]], counts: Sequence[Tensor], context: Context) -> list[dict[str, Any]]:
    """`batches` with ``token_share``, what the mean over a micro-batch's tokens is multiplied by, and ``tokens``.

    The loop takes the mean over micro-batches and ranks, in which a token would weigh more where captions are short. Weighed by
    its count / the mean count of all micro-batches of all ranks, that mean, and its gradient, is the one per token of a batch
    of them all. ``tokens``, a scalar of type float32, is how many tokens all micro-batches of all ranks have to predict.

    Args:
        batches: this rank's micro-batches; all ranks have equally many.
        counts: how many tokens each has to predict, scalars.
        context: the other ranks; nothing waits for the device.
    """
    count_M = paddle.stack([count.reshape([]) for count in counts]).astype("float32")
    total = context.total(count_M.sum())
    share_M = count_M * (len(batches) * context.data_size) / total.clip(min=1)
    return [{**batch, "token_share": share, "tokens": total} for batch, share in zip(batches, share_M.unbind(), strict=True)]


def weighed(loss: Tensor, batch: dict[str, Any]) -> Tensor:
    """A mean per token times its micro-batch's share; itself where `with_token_shares` was not called, as in evaluation."""
    return loss * batch["token_share"] if "token_share" in batch else loss


def padded(tensor_BL: Tensor, length: int) -> Tensor:
    """Token numbers or their mask with zeros behind them, [B, `length`]."""
    missing = length - tensor_BL.shape[1]
    return F.pad(tensor_BL, [0, missing]) if missing else tensor_BL
