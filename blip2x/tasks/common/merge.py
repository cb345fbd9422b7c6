"""What all ranks made of their samples, put together: each result once, in the order of the samples, in one go over them.

N samples on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from blip2x.parallel.context import Context

T = TypeVar("T")


def gather_rows(context: Context, rows: Sequence[tuple[int, T]], expected: np.ndarray) -> list[T]:
    """All ranks' rows in the order of the samples, on every rank.

    Args:
        context: the ranks.
        rows: this rank's (place among the samples, anything that can be pickled).
        expected: the places that all ranks together have, rising.

    Raises:
        RuntimeError: a place is missing, came twice, or is none of the expected ones.
    """
    parts = context.gather_objects(list(rows))
    position_N = _positions(np.array([place for part in parts for place, _ in part], dtype=np.int64), expected)
    merged: list[T] = [None] * len(expected)
    for position, row in zip(position_N.tolist(), (row for part in parts for _, row in part), strict=True):
        merged[position] = row
    return merged


def gather_array(context: Context, places: Sequence[int], blocks: Sequence[np.ndarray], expected: np.ndarray) -> np.ndarray:
    """As `gather_rows` for arrays [rows, ...] of one type: `blocks` are this rank's, `places` those of all their rows."""
    parts = context.gather_objects((np.array(places, dtype=np.int64), list(blocks)))
    position_N = _positions(np.concatenate([part for part, _ in parts]), expected)
    given = [block for _, own in parts for block in own]
    merged = np.empty((len(expected), *given[0].shape[1:]), given[0].dtype)
    start = 0
    for block in given:  # not joined first, so that they are in memory twice and not three times
        merged[position_N[start : start + len(block)]] = block
        start += len(block)
    return merged


def require_all(places_N: np.ndarray, *, samples: int, left_out: int) -> np.ndarray:
    """The places of what was evaluated, rising.

    Args:
        places_N: as they came from all ranks.
        samples: how many there are to evaluate.
        left_out: how many of them cannot be read.

    Raises:
        RuntimeError: one of the other samples was evaluated by no rank, or one by two.
    """
    count_N = np.bincount(places_N, minlength=samples)
    doubled = int((count_N > 1).sum())
    if doubled or len(count_N) > samples or len(places_N) != samples - left_out:
        raise RuntimeError(
            f"{len(places_N)} samples were evaluated by all ranks together, not {samples - left_out} ({samples} without "
            f"{left_out} that cannot be read); {doubled} of them by more than one rank"
        )
    return np.flatnonzero(count_N)


def _positions(places_N: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Where in `expected` each place is."""
    size = int(max(expected.max(initial=-1), places_N.max(initial=-1))) + 1
    position = np.full(size, -1)
    position[expected] = np.arange(len(expected))
    position_N = position[places_N]
    doubled = len(places_N) - len(np.flatnonzero(np.bincount(places_N, minlength=size)))
    if doubled or len(places_N) != len(expected) or (position_N < 0).any():
        raise RuntimeError(
            f"{len(places_N)} results came from all ranks, not {len(expected)}; {doubled} of them for a sample that had one"
        )
    return position_N
