"""Next-token prediction.

B sequences, L positions, V vocabulary.
"""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor

IGNORED = -100  # label of a position that is no target


def target_labels(ids_BL: Tensor, is_target_BL: Tensor) -> Tensor:
    """`ids_BL` where `is_target_BL` is not 0, `IGNORED` elsewhere; not shifted."""
    return paddle.where(is_target_BL.astype("bool"), ids_BL, paddle.full_like(ids_BL, IGNORED))


def lm_loss(logits_BLV: Tensor, label_BL: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the targets; position l's logits predict position l's label, so shift before.

    Averaged by hand: paddle's mean with a negative ignore_index divides by all positions. Smoothing gives each of the V
    tokens smoothing / V of the target's probability. Without any target the loss is 0.
    """
    logits_BLV = logits_BLV.astype("float32")
    counts_BL = label_BL != IGNORED
    known_BL = paddle.where(counts_BL, label_BL, paddle.zeros_like(label_BL))
    loss_BL = F.cross_entropy(logits_BLV, known_BL, reduction="none")
    if smoothing:
        # (1 - s) (lse - x_label) + s (lse - mean): the sum of exponentials, which costs most, is in loss_BL already
        label_logit_BL = paddle.take_along_axis(logits_BLV, known_BL.unsqueeze(-1), axis=-1).squeeze(-1)
        loss_BL = loss_BL + smoothing * (label_logit_BL - logits_BLV.mean(axis=-1))
    weight_BL = counts_BL.astype("float32")
    return (loss_BL * weight_BL).sum() / weight_BL.sum().clip(min=1)


def shift_right(ids_BL: Tensor, mask_BL: Tensor, start_id: int) -> tuple[Tensor, Tensor]:
    """Inputs with which an encoder-decoder model predicts `ids_BL` position by position: `start_id`, then all but the last."""
    first_B1 = paddle.full_like(ids_BL[:, :1], start_id)
    seen_B1 = paddle.ones_like(mask_BL[:, :1])
    return paddle.concat([first_B1, ids_BL[:, :-1]], axis=1), paddle.concat([seen_B1, mask_BL[:, :-1]], axis=1)
