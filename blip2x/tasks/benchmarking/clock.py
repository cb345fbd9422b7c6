"""Where the time of a step goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle

from blip2x.data.loader import Loader

REST = "rest"  # what belongs to no part
_END = object()


def waiting_for(device: str) -> Callable[[], None]:
    """What waits until `device` has done all that it was told; a CPU always has when a call returns."""
    return paddle.device.synchronize if device.startswith("gpu") else lambda: None


class Clock:
    """Gives each moment to the innermost part that is open, so that parts and rest add up to the whole.

    Each change of parts waits for the device, which is why a step with a clock takes longer than one without.
    """

    def __init__(self, wait: Callable[[], None]):
        self._wait = wait
        self._open: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what happens inside; `seconds` by part afterwards."""
        self.seconds = {}
        self._wait()
        self._open, self._since = [REST], time.perf_counter()
        try:
            yield
        finally:
            self._mark()
            self._open = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside is of the part `name`, but for parts inside of it. Nothing where the clock does not run."""
        if not self._open:
            yield
            return
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def _mark(self) -> None:
        self._wait()
        now = time.perf_counter()
        name = self._open[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


@contextmanager
def timed(clock: Clock, methods: Sequence[tuple[Any, str, str]]) -> Iterator[None]:
    """Inside, calls of `methods`, (object, name of its method, part), count as their parts, and waiting for loaders as "data".

    A layer is called through its ``forward``.
    """
    before = [(owner, name, vars(owner).get(name, _END)) for owner, name, _ in methods]
    given = Loader.__iter__
    try:
        for owner, name, part in methods:
            setattr(owner, name, _wrapped(clock, getattr(owner, name), part))
        Loader.__iter__ = lambda loader: _waited_for(clock, given(loader))
        yield
    finally:
        Loader.__iter__ = given
        for owner, name, own in before:
            if own is _END:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, own)


def _wrapped(clock: Clock, method: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        with clock.part(part):
            return method(*arguments, **named)

    return call


def _waited_for(clock: Clock, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with clock.part("data"):
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch
