"""Arithmetic of the degrees, and that errors say both numbers."""

import pytest

from blip2x.errors import UserError
from blip2x.parallel.degrees import Degrees, resolve_degrees


@pytest.mark.parametrize(
    ("dp", "sharding", "world_size", "expected"),
    [(1, 1, 1, (1, 1)), (-1, 1, 4, (4, 1)), (-1, 2, 8, (4, 2)), (2, -1, 8, (2, 4)), (1, 2, 2, (1, 2)), (-1, 1, 1, (1, 1))],
)
def test_minus_one_takes_what_is_left(dp, sharding, world_size, expected):
    assert resolve_degrees(dp, sharding, world_size) == Degrees(*expected)


@pytest.mark.parametrize(("dp", "sharding", "world_size"), [(3, 1, 4), (-1, 3, 4), (2, -1, 3), (-1, 4, 2), (1, 1, 2)])
def test_product_must_be_the_world_size(dp, sharding, world_size):
    with pytest.raises(UserError, match=rf"= \d+, but {world_size} process"):
        resolve_degrees(dp, sharding, world_size)


def test_both_open_is_refused():
    with pytest.raises(UserError, match="both -1"):
        resolve_degrees(-1, -1, 4)


@pytest.mark.parametrize("degree", [0, -2])
def test_other_numbers_are_refused(degree):
    with pytest.raises(UserError, match=f"parallelism.sharding={degree}"):
        resolve_degrees(-1, degree, 4)
