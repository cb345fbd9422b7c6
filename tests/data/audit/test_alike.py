"""Near duplicates are those that comparing each with each would find."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.data.audit.alike import near_groups

SMALL = np.zeros((300, 48), dtype=np.uint8)


def every_pair(shape, near):
    """Components of the graph of all pairs, found the slow way."""
    close = [[bin(int(a ^ b)).count("1") <= near for b in shape] for a in shape]
    label = np.arange(len(shape))
    for _ in shape:
        label = np.array([min(label[j] for j in range(len(shape)) if close[i][j]) for i in range(len(shape))])
        if (label == label[label]).all():
            break
    return label


def partition(label):
    return {frozenset(np.flatnonzero(label == value).tolist()) for value in np.unique(label)}


@pytest.mark.parametrize("near", [0, 1, 2, 5, 8])
def test_equals_the_comparison_of_all_pairs(near):
    rng = np.random.default_rng(near)
    shape = rng.integers(0, 2**64, 60, dtype=np.uint64)
    for index in range(20, 60):  # most are a few bits away from another one
        flipped = rng.choice(64, rng.integers(0, near + 3), replace=False)
        shape[index] = shape[rng.integers(0, index)] ^ np.bitwise_or.reduce(
            np.uint64(1) << flipped.astype(np.uint64), initial=0
        )
    found = partition(near_groups(shape, SMALL[:60], near))
    assert found == partition(every_pair(shape, near))
    assert len(found) < 60


def test_plain_pictures_of_other_colours_are_not_the_same():
    small = np.repeat(np.array([0, 5, 100], dtype=np.uint8), 48).reshape(3, 48)
    assert partition(near_groups(np.zeros(3, dtype=np.uint64), small, 2)) == {frozenset({0, 1}), frozenset({2})}


def test_nothing_and_one():
    assert near_groups(np.zeros(0, dtype=np.uint64), SMALL[:0], 2).tolist() == []
    assert near_groups(np.zeros(1, dtype=np.uint64), SMALL[:1], 2).tolist() == [0]
