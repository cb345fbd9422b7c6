"""One thread works for many requests: what paddle is set to holds per thread, and a device has no room for two at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

_POLL = 0.2  # seconds between looks at whether to stop


class Full(Exception):
    """As many requests as there are places for are here already."""


class Abandoned(Exception):
    """Nobody waits for the job that is worked on, or the server stops."""


class Job:
    """What one request waits for."""

    def __init__(self, work: Callable[[], Any]):
        self.work = work
        self.future: Future[Any] = Future()
        self.abandoned = False


class Jobs:
    """Places for requests, and their jobs in the order in which they came.

    `place`, `submit` and `abandon` are for the threads of the server, `work` and, inside a job, `look` for the working one.

    Args:
        places: requests at a time, the one that is worked on and those that are still sending included.
    """

    def __init__(self, places: int):
        self.places = places
        self.taken = 0
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._current: Job | None = None
        self._stopped: Callable[[], bool] = lambda: False
        self._closed = False

    @contextmanager
    def place(self) -> Iterator[None]:
        """Inside the block the request has its place; raises `Full` where there is none."""
        with self._change:
            if self.taken >= self.places:
                raise Full
            self.taken += 1
        try:
            yield
        finally:
            with self._change:
                self.taken -= 1

    def submit(self, work: Callable[[], Any]) -> Job:
        """Have `work` done; the job's future gets what it returns or raises. Raises `Abandoned` where the work is over."""
        job = Job(work)
        with self._change:
            if self._closed:
                raise Abandoned
            self._waiting.append(job)
            self._change.notify()
        return job

    def abandon(self, job: Job) -> None:
        """Nobody waits for `job` any more: it is taken out of the queue, or ended at its next `look`."""
        with self._change:
            job.abandoned = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.future.cancel()

    def look(self) -> None:
        """To be called often while a job is worked on; raises `Abandoned` where that is in vain."""
        if self._stopped() or (self._current and self._current.abandoned):
            raise Abandoned

    def work(self, stopped: Callable[[], bool]) -> None:
        """Do jobs until `stopped`; those that are left then fail with `Abandoned`."""
        self._stopped = stopped
        try:
            while not stopped():
                with self._change:
                    if not self._waiting:
                        self._change.wait(_POLL)
                    job = self._current = self._waiting.popleft() if self._waiting else None
                if job:
                    self._do(job)
        finally:
            with self._change:
                self._closed = True
                for job in self._waiting:
                    job.future.set_exception(Abandoned())
                self._waiting.clear()

    def _do(self, job: Job) -> None:
        if not job.future.set_running_or_notify_cancel():
            return
        try:
            job.future.set_result(job.work())
        except BaseException as error:
            is_failure = isinstance(error, Exception)
            job.future.set_exception(error if is_failure else Abandoned())  # what ends the process is not the request's
            if not is_failure:
                raise
        finally:
            self._current = None
