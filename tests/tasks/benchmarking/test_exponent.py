"""A power is found as it is, and through noise."""

from __future__ import annotations

import pytest

from blip2x.tasks.benchmarking.exponent import exponent


@pytest.mark.parametrize("power", [0, 0.5, 1, 2, -1])
def test_a_power_is_found(power):
    sizes = [1, 3, 10, 100]
    assert exponent(sizes, [7e-3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_the_fit_is_of_logarithms():
    assert exponent([1, 2, 4], [1, 4, 4]) == pytest.approx(1)  # each step counts alike, however large the times are
    assert exponent([1, 2, 4], [1e3, 4e3, 4e3]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([2], [1]), ([2, 2], [1, 2]), ([1, 2], [1, 0]), ([0, 1], [1, 1]), ([1, 2], [1])]
)
def test_what_has_no_exponent_is_refused(sizes, seconds):
    with pytest.raises(ValueError, match="exponent"):
        exponent(sizes, seconds)
