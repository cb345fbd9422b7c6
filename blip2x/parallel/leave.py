"""The end of a process among several."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leaving_quietly() -> Iterator[None]:
    """Behind the block, end a process among several at once, with the exit code that it would have.

    Now and then paddle's gloo crashes while the interpreter shuts down, and a run that has done everything would count as
    failed. A process alone goes on behind the block.
    """
    if int(os.environ.get("PADDLE_TRAINERS_NUM", "1")) == 1:
        yield
        return
    code: object = 0
    try:
        yield
    except SystemExit as stop:
        code = stop.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
