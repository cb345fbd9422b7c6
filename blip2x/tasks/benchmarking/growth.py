"""What operations on data cost as data grow: each makes data of a size, and takes the time of the operation alone.

Each is one that a run does once, or once per epoch, with all of its samples. Their exponents (seconds ~ size ** exponent)
should be near 1: sorting adds a logarithm, and what is small has fixed costs, which make the exponent smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from blip2x.metrics.bootstrap import resampled_means
from blip2x.metrics.cider import cider_scores
from blip2x.parallel.context import Context
from blip2x.tasks.common.merge import gather_rows

_WORDS = 500  # that captions are made of


def _merging(size: int) -> float:
    """Rows of as many samples from one rank, put in order."""
    order = np.random.default_rng(0).permutation(size)
    rows = [(place, {"caption": "a photo"}) for place in order.tolist()]
    return _seconds(lambda: gather_rows(Context(), rows, np.arange(size)))


def _cider(size: int) -> float:
    """Captions of as many images, with five references each."""
    captions = _captions(6 * size)
    references = [captions[start : start + 5] for start in range(size, 6 * size, 5)]
    return _seconds(lambda: cider_scores(references, captions[:size]))


def _intervals(size: int) -> float:
    """Of one mean over as many values, five of each image."""
    values, images = np.random.default_rng(0).random(size), np.arange(size) // 5
    return _seconds(lambda: resampled_means(values, images, [range(size)]))


GROWTHS: dict[str, Callable[[int], float]] = {  # name -> seconds of the operation at a size
    "merging": _merging,
    "cider": _cider,
    "intervals": _intervals,
}


def _captions(count: int) -> list[str]:
    word = np.random.default_rng(0).integers(_WORDS, size=(count, 10)).tolist()
    return [" ".join(map(str, row)) for row in word]


def _seconds(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start
