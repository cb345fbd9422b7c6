"""Intervals of means, with what statistics says about them."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.metrics.bootstrap import mean_intervals


def mean_interval(values, images):
    return mean_intervals(values, images, [range(len(values))])[0]


def test_the_interval_of_single_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(10, 2, size=2000)
    low, high = mean_interval(values, np.arange(2000))
    error = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_questions_about_one_image_are_drawn_together():
    """Ten equal values per image say no more than one: as independent values they would halve the interval and more."""
    once = np.random.default_rng(2).integers(0, 2, size=400)
    alone = mean_interval(once, np.arange(400))
    assert mean_interval(np.repeat(once, 10), np.repeat(np.arange(400), 10)) == pytest.approx(alone)


def test_images_with_more_questions_weigh_more():
    low, high = mean_interval([1] * 99 + [0], [0] * 99 + [7])
    assert (low, high) == (0, 1)  # either image alone can be drawn twice
    values, images = [1] * 300 + [0] * 100, [n // 3 for n in range(300)] + [100 + n for n in range(100)]
    low, high = mean_interval(values, images)
    assert low < 0.75 < high and high - low < 0.15


def test_the_same_values_give_the_same_interval_and_the_numbers_of_images_do_not_matter():
    values = [0.0, 0.3, 0.6, 0.9, 1.0]
    assert mean_interval(values, range(5)) == mean_interval(values, range(10, 15))


def test_few_images():
    assert mean_intervals([], [], []) == [] and mean_interval([], []) is None
    assert mean_interval([1, 0, 1], [5, 5, 5]) is None
    assert mean_interval([1, 1], [1, 2]) == (1, 1)


def test_many_images_are_drawn_in_pieces_alike(monkeypatch):
    values = np.random.default_rng(3).random(50)
    whole = mean_interval(values, np.arange(50))
    monkeypatch.setattr("blip2x.metrics.bootstrap._AT_ONCE", 170)
    assert mean_interval(values, np.arange(50)) == pytest.approx(whole)


def test_parts_have_intervals_of_their_own_values():
    values, images = np.random.default_rng(4).random(600), np.arange(600) // 3
    parts = [range(600), range(300), [0, 1, 2], [], range(300, 600)]
    whole, first, single, none, last = mean_intervals(values, images, parts)
    assert single is None and none is None and whole == mean_interval(values, images)
    for (low, high), part in ((first, parts[1]), (last, parts[4])):
        assert low < values[part].mean() < high
        alone = mean_interval(values[part], images[part])
        assert high - low == pytest.approx(alone[1] - alone[0], rel=0.15)  # also the number of its images varies
    assert whole[1] - whole[0] == pytest.approx((first[1] - first[0]) / 2**0.5, rel=0.15)


def test_a_rare_part_is_that_of_the_draws_that_have_it():
    values = [0.0, 1.0] + [0.5] * 98
    (ends,) = mean_intervals(values, range(100), [[0, 1]])
    assert ends == (0, 1)
