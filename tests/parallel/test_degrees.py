"""Arithmetic of the degrees, and that errors say both numbers."""

import pytest

from blip2x.config.compose import compose_config
from blip2x.config.load import load_config
from blip2x.errors import UserError
from blip2x.parallel.degrees import Degrees, resolve_degrees


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ((1, 1, 1), 1, (1, 1, 1)),
        ((-1, 1, 1), 4, (4, 1, 1)),
        ((-1, 2, 1), 8, (4, 2, 1)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((-1, 2, 2), 16, (4, 2, 2)),
        ((1, -1, 4), 8, (1, 2, 4)),
        ((2, 2, -1), 8, (2, 2, 2)),
        ((-1, 1, 2), 2, (1, 1, 2)),
    ],
)
def test_minus_one_takes_what_is_left(given, world_size, expected):
    assert resolve_degrees(*given, world_size) == Degrees(*expected)


@pytest.mark.parametrize(
    ("given", "world_size", "product"),
    [((3, 1, 1), 4, 3), ((-1, 3, 1), 4, 3), ((2, -1, 1), 3, 2), ((-1, 4, 1), 2, 4), ((1, 1, 1), 2, 1), ((-1, 2, 2), 6, 4)],
)
def test_product_must_be_the_world_size(given, world_size, product):
    with pytest.raises(UserError, match=rf"= {product}, but {world_size} process\(es\) were started"):
        resolve_degrees(*given, world_size)


@pytest.mark.parametrize(
    ("given", "names"), [((-1, -1, 1), "dp and parallelism.sharding"), ((-1, 2, -1), "dp and parallelism.tp")]
)
def test_two_open_ones_are_refused(given, names):
    with pytest.raises(UserError, match=f"parallelism.{names} are both -1"):
        resolve_degrees(*given, 4)


@pytest.mark.parametrize("degree", [0, -2])
@pytest.mark.parametrize("place", range(3))
def test_other_numbers_are_refused(degree, place):
    given = [1, 1, 1]
    given[place] = degree
    with pytest.raises(UserError, match=rf"parallelism\.{('dp', 'sharding', 'tp')[place]}={degree} must be"):
        resolve_degrees(*given, 4)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("dp=0", "parallelism.dp must be 1 or more, or -1"),
        ("tp=-2", "parallelism.tp must be 1 or more, or -1"),
        ("sharding_stage=4", "parallelism.sharding_stage: unknown value 4"),
        ("tp_vision=true", "parallelism.tp=1 shares with nobody"),
    ],
)
def test_a_config_is_refused_before_processes_join(word, named):
    with pytest.raises(UserError, match=named):
        load_config(compose_config(["parallelism=dp", f"parallelism.{word}"]), [])
