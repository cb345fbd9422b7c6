"""Cost against size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from blip2x.config.tools import BenchmarkConfig
from blip2x.errors import UserError
from blip2x.tasks.benchmarking.exponent import exponent
from blip2x.tasks.benchmarking.growth import GROWTHS
from blip2x.tasks.benchmarking.jobs import DECODES, TRAINS
from blip2x.tasks.benchmarking.measure import Spread

OPERATIONS = "operations"  # on data and scores, which belong to no task
_APPLIES = {  # curve -> the tasks that have such a size
    "batch": (*TRAINS, *DECODES),  # a search has as many images as are searched
    "image_tokens": (*TRAINS, *DECODES, "retrieval"),
    "text_length": (*TRAINS, *DECODES, "retrieval"),
    "queries": (*TRAINS, *DECODES, "retrieval"),
    "new_tokens": DECODES,
    "images": (*DECODES, "retrieval"),
}


@dataclass(frozen=True)
class Curve:
    """The time of a step, or of an operation, at several sizes.

    Attributes:
        size: what grows: a key of task.sizes.
        of: the task, or the operation.
        sizes: rising.
        seconds: of each size the median.
        fastest: of each size the shortest of the repeats, which other processes disturb least.
        expected: the exponent of the counted multiplications and additions at these sizes, 1 where it is to be linear.
    """

    size: str
    of: str
    sizes: list[int]
    seconds: list[float]
    fastest: list[float]
    expected: float

    @property
    def exponent(self) -> float:
        """Of the fastest repeats."""
        return exponent(self.sizes, self.fastest)

    def record(self) -> dict[str, Any]:
        """For benchmark.json."""
        return {**vars(self), "exponent": self.exponent}


def planned(task: BenchmarkConfig) -> list[tuple[str, str, list[int]]]:
    """(what grows, the task, its sizes) of each curve of `task` but that of operations.

    Raises:
        UserError: none of the tasks has such a size.
    """
    found = []
    for size in task.curves:
        if size == OPERATIONS:
            continue
        tasks = [name for name in task.of if name in _APPLIES[size]]
        if not tasks:
            raise UserError(
                f"task.curves={size}: none of {', '.join(task.of)} has such a size; "
                f"add one of {', '.join(_APPLIES[size])} to task.of"
            )
        found += [(size, name, list(getattr(task.sizes, size))) for name in tasks]
    return found


def grown_operations(task: BenchmarkConfig, advance: Callable[[], None]) -> list[Curve]:
    """The curve of each operation; `advance` is called after each time that one was done."""
    curves = []
    for name, operation in GROWTHS.items():
        times = [_repeated(operation, size, task.repeats, advance) for size in task.sizes.operations]
        spreads = [Spread.of(own) for own in times]
        medians, fastest = [spread.median for spread in spreads], [spread.min for spread in spreads]
        curves.append(Curve(OPERATIONS, name, list(task.sizes.operations), medians, fastest, 1.0))
    return curves


def _repeated(operation: Callable[[int], float], size: int, times: int, advance: Callable[[], None]) -> Sequence[float]:
    found = []
    for _ in range(times):
        found.append(operation(size))
        advance()
    return found
