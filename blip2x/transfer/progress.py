"""What people see of a file on its way: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]

SECONDS_BETWEEN_LINES = 30.0  # where standard error is not a terminal


class TransferProgress:
    """Bytes that have come: a bar on a terminal, else a line at the start, at the end, and now and then."""

    def __init__(self, name: str, say: Say | None):
        self._name = name
        self._say = say or say_on_stderr
        self._bar: Any = None
        self._first = 0
        self._started = self._last_line = time.monotonic()
        if say is None and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(name, total=None, visible=False)

    def __enter__(self) -> TransferProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line, above the bar where there is one."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._say(line)

    def begin(self, url: str, have: int, total: int | None) -> None:
        """`have` bytes are there before anything is fetched in this attempt."""
        self._first = have
        self._started = self._last_line = time.monotonic()
        if self._bar:
            self._bar.reset(self._task, total=total, completed=have, visible=True)
        else:
            what = "" if total is None else f" ({byte_count(total)})"
            self.say(f"{self._name}: {'continuing at ' + byte_count(have) if have else 'fetching'}{what} from {url}")

    def at(self, have: int, total: int | None) -> None:
        """`have` bytes are there."""
        if self._bar:
            self._bar.update(self._task, completed=have)
        elif (now := time.monotonic()) - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = (have - self._first) / (now - self._started)
            left = "" if total is None or not rate else f" of {byte_count(total)}, {(total - have) / rate:.0f} s left"
            self.say(f"{self._name}: {byte_count(have)}{left}, {byte_count(rate)}/s")

    def end(self, size: int) -> None:
        """All has come and is in its place."""
        if not self._bar:
            self.say(f"{self._name}: {byte_count(size)}, complete")


def say_on_stderr(line: str) -> None:
    """Print it there at once."""
    print(line, file=sys.stderr, flush=True)


def byte_count(size: float) -> str:
    """Bytes for readers: "3.2 MB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name = TextColumn("{task.description}", markup=False)
    return Progress(
        name, BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
