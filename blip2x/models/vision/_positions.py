"""Learned positions for another image size."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F

from blip2x.errors import UserError


def interpolate_positions(array: np.ndarray, wanted_shape: tuple[int, ...], *, align_corners: bool) -> np.ndarray:
    """Stretch positions [1, 1 + n * n, D] to `wanted_shape`, [1, 1 + m * m, D]; the class token's row stays as it is.

    Args:
        array: the stored positions, the class token's first.
        wanted_shape: of the model's positions; another D is not this function's to mend and stays as stored.
        align_corners: whether the corners' patches keep their values (LAVIS does so for CLIP, and not for EVA).

    Raises:
        UserError: behind the class token stands no square grid.
    """
    side = math.isqrt(max(array.shape[1] - 1, 0)) if array.ndim == 3 else 0
    if side == 0 or array.shape[:2] != (1, 1 + side**2):
        raise UserError(
            f"stored positions {list(array.shape)} cannot be fitted to {list(wanted_shape)}: "
            "they should be [1, 1 + n * n, width], the class token's and then a square grid of patches"
        )
    wanted_side = math.isqrt(wanted_shape[1] - 1)
    if wanted_side == side:
        return array
    whole = array.astype(np.float32)  # half precision would be felt in the sums of sixteen neighbours
    grid_1NND = paddle.to_tensor(whole[:, 1:].reshape(1, side, side, -1))
    grid_1MMD = F.interpolate(
        grid_1NND.transpose([0, 3, 1, 2]), size=[wanted_side, wanted_side], mode="bicubic", align_corners=align_corners
    ).transpose([0, 2, 3, 1])
    patches = grid_1MMD.numpy().reshape(1, wanted_side**2, -1)
    return np.concatenate([whole[:, :1], patches], axis=1).astype(array.dtype)
