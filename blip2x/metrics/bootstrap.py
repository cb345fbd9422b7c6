"""How far means would move with another sample of images: percentile intervals of the bootstrap.

N values of I images, K means of some of them, R resamples. Images are drawn, not values: the questions about one picture stand
and fall together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

LEVEL = 0.95  # of the intervals
RESAMPLES = 1000
_SEED = 0
_AT_ONCE = 4_000_000  # draws in memory


Interval = tuple[float, float]


def mean_intervals(values_N: Sequence[float], images_N: Sequence[int], parts: Sequence[Sequence[int]]) -> list[Interval | None]:
    """For each part the two ends between which 95 % of its means lie that other draws of as many images give.

    Takes what `resampled_means` takes. None for a part of fewer than two images, where no draw can be told from another.
    """
    return [interval(means_R) for means_R in resampled_means(values_N, images_N, parts)]


def interval(means_R: np.ndarray) -> Interval | None:
    """The two ends between which 95 % of the means lie, those that are no number aside; None where all are none."""
    if np.isnan(means_R).all():
        return None
    return tuple(np.nanquantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist())


def resampled_means(values_N: Sequence[float], images_N: Sequence[int], parts: Sequence[Sequence[int]]) -> np.ndarray:
    """The means [K, R] of parts that other draws of as many images give; draw r is the same for all parts.

    The same values give the same means.

    Args:
        values_N: what means are taken of.
        images_N: the image that each value belongs to, any number that tells it from others.
        parts: K lists of places among the values; a part's mean is that of its values.

    Returns:
        NaN where a draw has no image of the part, and for a part of fewer than two images.
    """
    means_KR = np.full((len(parts), RESAMPLES), np.nan)
    if not any(map(len, parts)):
        return means_KR
    _, image_N = np.unique(np.asarray(images_N, dtype=np.int64), return_inverse=True)
    images, values_N = int(image_N.max()) + 1, np.asarray(values_N, dtype=np.float64)
    place_E = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    part_E = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    where, shape = (part_E, image_N[place_E]), (len(parts), images)
    sum_KI, size_KI = csr_array((values_N[place_E], where), shape), csr_array((np.ones(len(place_E)), where), shape)
    sum_KI.sum_duplicates()
    size_KI.sum_duplicates()
    rng = np.random.default_rng(_SEED)
    at_once = max(1, _AT_ONCE // images)
    for start in range(0, RESAMPLES, at_once):
        count = min(at_once, RESAMPLES - start)
        drawn_RI = rng.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        times_RI = np.bincount(drawn_RI.ravel(), minlength=count * images).reshape(count, images)
        times_IR = times_RI.T.astype(np.float64, order="C")
        size_KR = size_KI @ times_IR
        np.divide(sum_KI @ times_IR, size_KR, out=means_KR[:, start : start + count], where=size_KR > 0)
    means_KR[np.diff(size_KI.indptr) < 2] = np.nan
    return means_KR
