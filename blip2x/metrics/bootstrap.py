"""How far a mean would move with another sample of images: percentile intervals of the bootstrap.

N values of I images, R resamples. Images are drawn, not values: the questions about one picture stand and fall together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95  # of the intervals
RESAMPLES = 1000
_SEED = 0
_AT_ONCE = 4_000_000  # draws in memory


def mean_interval(values_N: Sequence[float] | np.ndarray, images_N: Sequence[int] | np.ndarray) -> tuple[float, float] | None:
    """The two ends between which 95 % of the means lie that other draws of as many images give.

    The same values give the same interval.

    Args:
        values_N: what the mean is of.
        images_N: the image that each value belongs to, any number that tells it from others.

    Returns:
        None with fewer than two images, of which no draw can be told from another.
    """
    _, image_N = np.unique(np.asarray(images_N), return_inverse=True)
    sum_I = np.bincount(image_N, weights=np.asarray(values_N, dtype=np.float64))
    size_I = np.bincount(image_N).astype(np.float64)
    images = len(sum_I)
    if images < 2:
        return None
    rng, alike = np.random.default_rng(_SEED), bool((size_I == size_I[0]).all())
    means = np.empty(RESAMPLES)
    rows = max(1, _AT_ONCE // images)
    for start in range(0, RESAMPLES, rows):
        drawn_RI = rng.integers(images, size=(min(rows, RESAMPLES - start), images), dtype=np.int32)
        count = size_I[0] * images if alike else size_I[drawn_RI].sum(axis=1)
        means[start : start + rows] = sum_I[drawn_RI].sum(axis=1) / count
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
