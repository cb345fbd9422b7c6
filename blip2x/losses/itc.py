"""Image-text contrast (ITC), section 3.1 of the BLIP-2 paper.

B pairs on this rank, K pairs on all ranks, Q queries, E width of the shared space.
"""

from __future__ import annotations

import paddle
from paddle import Tensor

from blip2x.losses.log_softmax import log_softmax


def similarities(
    image_BQE: Tensor, text_BE: Tensor, all_image_KQE: Tensor, all_text_KE: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of this rank's images with all texts and of its texts with all images; a pair scores by its best query.

    Features are normalised before. Returns (i2t_BK, t2i_BK), both divided by the temperature, in float32: half precision would
    not tell similar texts apart.
    """
    image_BQE, text_BE, all_image_KQE, all_text_KE = (
        feature.astype("float32") for feature in (image_BQE, text_BE, all_image_KQE, all_text_KE)
    )
    with paddle.amp.auto_cast(enable=False):  # which would multiply in half precision
        i2t_BQK = paddle.matmul(image_BQE, all_text_KE, transpose_y=True)
        t2i_KQB = paddle.matmul(all_image_KQE, text_BE, transpose_y=True)
    return i2t_BQK.max(axis=1) / temperature, t2i_KQB.max(axis=1).transpose([1, 0]) / temperature


def same_image(image_id_B: Tensor, all_image_id_K: Tensor) -> Tensor:
    """Whether row b and column k come from one image, bool [B, K]."""
    return image_id_B.unsqueeze(1) == all_image_id_K.unsqueeze(0)


def contrast_targets(same_image_BK: Tensor, smoothing: float) -> Tensor:
    """Probability that each column should get: one image's columns share 1 - smoothing, all columns share the rest.

    With distinct images this is the target of a cross-entropy with label smoothing. Each row has a column of its own image.
    """
    positive_BK = same_image_BK.astype("float32")
    share_BK = positive_BK / positive_BK.sum(axis=1, keepdim=True)
    return (1 - smoothing) * share_BK + smoothing / positive_BK.shape[1]


def itc_loss(i2t_BK: Tensor, t2i_BK: Tensor, target_BK: Tensor) -> Tensor:
    """Cross-entropy with soft targets, the mean of both directions; one matrix serves both, as "same image" is symmetric."""
    log_BK = log_softmax(i2t_BK, axis=1) + log_softmax(t2i_BK, axis=1)
    return -(target_BK * log_BK).sum(axis=1).mean() / 2
