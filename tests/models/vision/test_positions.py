"""Positions of another image size; what bicubic gives is compared with PyTorch's in tests/parity/vision."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.errors import UserError
from blip2x.models.vision._positions import interpolate_positions


def positions(side: int, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 1 + side * side, width)).astype("float32")


@pytest.mark.parametrize("align_corners", [False, True])
def test_shape_class_row_and_type(align_corners):
    stored = positions(4)
    for side in (1, 3, 6):
        wanted = (1, 1 + side**2, 5)
        new = interpolate_positions(stored, wanted, align_corners=align_corners)
        assert new.shape == wanted and new.dtype == np.float32
        np.testing.assert_array_equal(new[:, 0], stored[:, 0])


def test_the_same_grid_is_left_alone():
    stored = positions(4)
    assert interpolate_positions(stored, (1, 17, 5), align_corners=False) is stored


def test_rows_and_columns_are_not_exchanged():
    row, column = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing="ij")
    stored = np.zeros((1, 17, 2), "float32")
    stored[0, 1:] = np.stack([row.ravel(), column.ravel()], axis=-1)
    new = interpolate_positions(stored, (1, 1 + 7**2, 2), align_corners=True)[0, 1:].reshape(7, 7, 2)
    np.testing.assert_allclose(new[:, :1, 0], new[:, 6:, 0], atol=1e-6)
    assert (np.diff(new[:, 0, 0]) > 0).all() and (np.diff(new[0, :, 1]) > 0).all()


def test_half_precision_is_summed_in_float32():
    stored = positions(4).astype("float16")
    new = interpolate_positions(stored, (1, 50, 5), align_corners=False)
    whole = interpolate_positions(stored.astype("float32"), (1, 50, 5), align_corners=False)
    assert new.dtype == np.float16
    np.testing.assert_array_equal(new, whole.astype("float16"))


def test_another_width_is_left_for_the_loader_to_report():
    assert interpolate_positions(positions(4), (1, 50, 8), align_corners=False).shape == (1, 50, 5)


@pytest.mark.parametrize("shape", [(1, 16, 5), (1, 19, 5), (1, 1, 5), (1, 0, 5), (17, 5), (2, 17, 5)])
def test_no_square_grid(shape):
    with pytest.raises(UserError, match=str(list(shape)).replace("[", r"\[")):
        interpolate_positions(np.zeros(shape, "float32"), (1, 50, 5), align_corners=False)
