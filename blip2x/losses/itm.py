"""Image-text matching (ITM) with hard negatives, section 3.1 of the BLIP-2 paper.

B pairs on this rank, K pairs on all ranks, N pairs to be told matched (1) or not (0).
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor


@paddle.no_grad()
def draw_negatives(similarity_BK: Tensor, same_image_BK: Tensor) -> tuple[Tensor, Tensor]:
    """For each row a column of another image, drawn with softmax(similarity): one draw for all rows, nothing waits for it.

    A row whose columns all show its own image (a batch of one) has no negative: its index means nothing and the loss has
    to leave it out.

    Returns:
        Column indices int64 [B], and whether the row has a negative, bool [B].
    """
    other_BK = paddle.logical_not(same_image_BK)
    exists_B = other_BK.any(axis=1)
    # The softmax runs over the other images only, so that they never all underflow beside a similar one of the same image.
    # A row without any would be nan, and a distribution of zeros is an error: let it draw from all.
    candidate_BK = paddle.logical_or(other_BK, paddle.logical_not(exists_B).unsqueeze(1))
    minus_infinity = paddle.full([], float("-inf"), dtype="float32")
    weight_BK = F.softmax(paddle.where(candidate_BK, similarity_BK.astype("float32"), minus_infinity), axis=1)
    # One of one: with or without replacement is the same, but without paddle checks on the host, for which a GPU would wait.
    return paddle.multinomial(weight_BK, num_samples=1, replacement=True)[:, 0], exists_B


def itm_loss(logits_N2: Tensor, label_N: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and share of right decisions over the pairs that count (bool [N], at least one)."""
    weight_N = counts_N.astype("float32")
    loss_N = F.cross_entropy(logits_N2.astype("float32"), label_N, reduction="none")
    right_N = (logits_N2.argmax(axis=1) == label_N).astype("float32")
    return (loss_N * weight_N).sum() / weight_N.sum(), (right_N * weight_N).sum() / weight_N.sum()
