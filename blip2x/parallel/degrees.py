"""Degrees of parallelism: arithmetic on plain numbers, before any device is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blip2x.errors import UserError


@dataclass(frozen=True)
class Degrees:
    """How many ranks each kind of parallelism has; their product is the world size.

    Neighbouring ranks share tensors, the next larger groups share what sharding divides, and dp is outermost: rank r is number
    r % tp of its tensor group.
    """

    dp: int
    sharding: int
    tp: int = 1


def resolve_degrees(dp: int, sharding: int, tp: int, world_size: int) -> Degrees:
    """Replace a -1 by what the other degrees leave of `world_size`.

    Raises:
        UserError: a degree is neither positive nor -1, several are -1, or the product is not the world size.
    """
    degrees = {"dp": dp, "sharding": sharding, "tp": tp}
    for name, degree in degrees.items():
        if degree != -1 and degree < 1:
            raise UserError(f"parallelism.{name}={degree} must be 1 or more, or -1 for what the other degrees leave")
    left = [f"parallelism.{name}" for name, degree in degrees.items() if degree == -1]
    if len(left) > 1:
        raise UserError(f"{' and '.join(left)} are {'both' if len(left) == 2 else 'all'} -1; give all but one of them a number")
    fixed = math.prod(degree for degree in degrees.values() if degree != -1)
    degrees = {name: max(1, world_size // fixed) if degree == -1 else degree for name, degree in degrees.items()}
    product = math.prod(degrees.values())
    if product != world_size:
        raise UserError(
            f"parallelism.dp * parallelism.sharding * parallelism.tp = {' * '.join(map(str, degrees.values()))} = {product}, "
            f"but {world_size} process(es) were started; change the degrees or start {product} with "
            "python -m paddle.distributed.launch"
        )
    return Degrees(**degrees)
