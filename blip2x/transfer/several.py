"""Several transfers at a time, none of which takes the others down with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from blip2x.errors import UserError
from blip2x.transfer.progress import Board, Stopped

K = TypeVar("K")
V = TypeVar("V")


def run_several(jobs: Mapping[K, Callable[[], V]], limit: int, board: Board) -> dict[K, V | UserError]:
    """Run `jobs` in threads, at most `limit` at once and in their order; the `UserError` of one is its result.

    Another exception, and what interrupts this thread, stops the board's transfers and is raised.
    """
    waiting: queue.SimpleQueue[tuple[K, Callable[[], V]]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[tuple[K, V | BaseException]] = queue.SimpleQueue()
    for job in jobs.items():
        waiting.put(job)

    def work() -> None:
        while True:
            try:
                key, job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                board.require_going()
                ended.put((key, job()))
            except BaseException as error:
                ended.put((key, error))

    for _ in range(min(limit, len(jobs))):
        # daemons: at the end of the process none is waited for, and what a killed transfer leaves behind is gone on with
        threading.Thread(target=work, daemon=True).start()
    results: dict[K, V | UserError] = {}
    try:
        while len(results) < len(jobs):
            key, result = ended.get()
            if isinstance(result, BaseException) and not isinstance(result, (UserError, Stopped)):
                raise result
            results[key] = result
    except BaseException:
        board.stop()
        raise
    return {key: results[key] for key in jobs}
