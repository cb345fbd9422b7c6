"""Near duplicates are those that comparing each with each would find."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.data.audit import alike
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


def plain_pictures(count, noise):
    """Small pictures of one colour each, but for some noise, with one hash."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 1, 3)) + rng.integers(-noise, noise + 1, (count, 16, 3))
    return np.zeros(count, dtype=np.uint64), np.clip(small, 0, 255).astype(np.uint8).reshape(count, 48)


def test_what_is_the_same_is_one_group_however_many_there_are(monkeypatch):
    monkeypatch.setattr(alike, "_NEIGHBOURS", 1)
    left, right = (
        [0] * 24 + [200] * 24,
        [200] * 24 + [0] * 24,
    )  # of one mean colour: they stay in this order, none beside its like
    small = np.array([left, right, left, right, left], dtype=np.uint8)
    assert partition(near_groups(np.array([7, 7, 7, 7, 5 << 40], dtype=np.uint64), small, 0)) == {
        frozenset({0, 2}), frozenset({1, 3}), frozenset({4}),
    }  # fmt: skip


def test_bounds_never_join_what_comparing_all_pairs_keeps_apart(monkeypatch):
    shape, small = plain_pictures(400, 2)
    every = near_groups(shape, small, 2)
    monkeypatch.setattr(alike, "_NEIGHBOURS", 20)
    monkeypatch.setattr(alike, "_COMPARISONS", 1000)
    bounded = near_groups(shape, small, 2)
    assert all(any(group <= whole for whole in partition(every)) for group in partition(bounded))
    assert len(partition(every)) <= len(partition(bounded)) < 2 * len(partition(every))


@pytest.mark.parametrize(("bound", "number", "most"), [("_COMPARISONS", 100_000, 6 * 100_000), ("_IN_ALL", 300_000, 300_000)])
def test_very_many_plain_pictures_are_not_compared_each_with_each(monkeypatch, bound, number, most):
    compared = []
    count_bits = alike._bits
    monkeypatch.setattr(alike, "_bits", lambda numbers: compared.append(len(numbers)) or count_bits(numbers))
    monkeypatch.setattr(alike, bound, number)
    near_groups(*plain_pictures(5000, 3), 2)
    assert 0 < sum(compared) <= most  # there are six ways to choose two of four parts


def test_nothing_and_one():
    assert near_groups(np.zeros(0, dtype=np.uint64), SMALL[:0], 2).tolist() == []
    assert near_groups(np.zeros(1, dtype=np.uint64), SMALL[:1], 2).tolist() == [0]
