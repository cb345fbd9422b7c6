"""Being asked to stop: the step is finished, the state saved, and the process ends with a code to start it again on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from blip2x.errors import Interrupted

# USR1 is what Slurm's --signal=USR1@120 sends before the end
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Outside of a training TERM ends a process as it always does: launchers send it to the ranks that are left when one has failed,
# which must not look like a job to start again.
AT_ONCE = (signal.SIGINT, signal.SIGUSR1)


class _AtOnce:
    """A handler: the program ends where it is."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _ignore_repeats()
        raise Interrupted(f"{signal.Signals(number).name}; what was finished is kept")


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside the block, what is `AT_ONCE` raises `Interrupted`, unless `StopSignals` takes it. The process is to end then."""
    before = {number: signal.signal(number, _AtOnce()) for number in AT_ONCE}
    try:
        yield
    except Interrupted:
        _ignore_repeats()
        raise
    except BaseException:
        _restore(before)
        raise
    else:
        _restore(before)


class StopSignals:
    """Inside the block, a signal only sets `received`. Launchers repeat theirs; a second Ctrl-C of a person is obeyed."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _restore(self._before)
        if isinstance(error, Interrupted) and any(isinstance(handler, _AtOnce) for handler in self._before.values()):
            _ignore_repeats()
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def _ignore_repeats() -> None:
    """While the process ends launchers send their signals again, which must not keep it from its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
