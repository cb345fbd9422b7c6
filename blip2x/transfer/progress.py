"""What people see of files on their way: a bar each on a terminal, else lines."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

Say = Callable[[str], None]

SECONDS_BETWEEN_LINES = 30.0  # where standard error is not a terminal


class Stopped(Exception):
    """A transfer was told to stop."""


class Board:
    """Where transfers in several threads are shown side by side, and stopped together."""

    def __init__(self, say: Say | None = None):
        self._lock = threading.Lock()
        self._line = say or say_on_stderr
        self._stopped = threading.Event()
        self.bar: Any = _bar() if say is None and sys.stderr.isatty() else None

    def __enter__(self) -> Board:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self.bar:
            self.bar.stop()

    def say(self, line: str) -> None:
        """A line, above the bars where there are any."""
        with self._lock:
            if self.bar:
                self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                self._line(line)

    def stop(self) -> None:
        """Transfers raise `Stopped` at their next piece."""
        self._stopped.set()

    def require_going(self) -> None:
        """Raise `Stopped` behind `stop`."""
        if self._stopped.is_set():
            raise Stopped


class TransferProgress:
    """Bytes that have come: a bar on a terminal, else a line at the start, at the end, and now and then."""

    def __init__(self, name: str, say: Say | None, board: Board | None = None):
        self._name = name
        self._own = board is None
        self._board = board or Board(say)
        self._bar = self._board.bar
        self._first = 0
        self._started = self._last_line = time.monotonic()
        self.say = self._board.say
        if self._bar:
            self._task = self._bar.add_task(name, total=None, visible=False)

    def __enter__(self) -> TransferProgress:
        if self._own:
            self._board.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._own:
            self._board.__exit__()

    def begin(self, url: str, have: int, total: int | None) -> None:
        """`have` bytes are there before anything is fetched in this attempt."""
        what = "" if total is None else f" ({byte_count(total)})"
        line = f"{self._name}: {'continuing at ' + byte_count(have) if have else 'fetching'}{what} from {url}"
        self._restart(line, self._name, have, total)

    def unpack(self, total: int) -> None:
        """From here on bytes of an archive are counted, which is being unpacked."""
        self._restart(f"{self._name}: unpacking {byte_count(total)}", f"{self._name}, unpacking", 0, total)

    def _restart(self, line: str, description: str, have: int, total: int | None) -> None:
        self._first = have
        self._started = self._last_line = time.monotonic()
        if self._bar:
            self._bar.reset(self._task, total=total, completed=have, visible=True, description=description)
        else:
            self.say(line)

    def at(self, have: int, total: int | None) -> None:
        """`have` bytes are there."""
        self._board.require_going()
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


class CountProgress:
    """How many of very many small transfers are done: one line on a terminal that changes, else a line now and then."""

    def __init__(self, name: str, say: Say | None = None):
        self._name = name
        self._say = say or say_on_stderr
        self._started = self._last_line = time.monotonic()
        self._status: Any = None
        if say is None and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(name)

    def __enter__(self) -> CountProgress:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status:
            self._status.stop()

    def at(self, done: int, failed: int) -> None:
        """So many have been fetched, and so many could not be."""
        now = time.monotonic()
        if now - self._last_line < (0.2 if self._status else SECONDS_BETWEEN_LINES):
            return
        self._last_line = now
        rate = (done + failed) / (now - self._started)
        line = f"{self._name}: {done:,} fetched, {failed:,} cannot be, {rate:.0f}/s"
        if self._status:
            self._status.update(line)
        else:
            self._say(line)


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
