"""Degrees of parallelism: arithmetic on plain numbers, before any device is touched."""

from __future__ import annotations

from dataclasses import dataclass

from blip2x.errors import UserError


@dataclass(frozen=True)
class Degrees:
    """How many ranks each kind of parallelism has; their product is the world size."""

    dp: int
    sharding: int


def resolve_degrees(dp: int, sharding: int, world_size: int) -> Degrees:
    """Replace a -1 by what the other degree leaves of `world_size`.

    Raises:
        UserError: a degree is neither positive nor -1, both are -1, or the product is not the world size.
    """
    for name, degree in (("dp", dp), ("sharding", sharding)):
        if degree != -1 and degree < 1:
            raise UserError(f"parallelism.{name}={degree} must be 1 or more, or -1 for what the other degree leaves")
    if dp == -1 and sharding == -1:
        raise UserError("parallelism.dp and parallelism.sharding are both -1; give one of them a number")
    if dp == -1:
        dp = max(1, world_size // sharding)
    elif sharding == -1:
        sharding = max(1, world_size // dp)
    if dp * sharding != world_size:
        raise UserError(
            f"parallelism.dp * parallelism.sharding = {dp} * {sharding} = {dp * sharding}, but {world_size} process(es) were "
            f"started; change the degrees or start {dp * sharding} with python -m paddle.distributed.launch"
        )
    return Degrees(dp, sharding)
