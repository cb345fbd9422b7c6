"""Where a run prints: a terminal, or a file that others read later."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 120  # columns, wide enough for the results table


class QuietConsole(Console):
    """Prints tables, which hold a run's results, and what is in yellow, the colour of all warnings; nothing else.

    A run's log gets everything all the same: render hooks are called for what is not printed, too.
    """

    def print(self, *objects: Any, style: Any = None, **options: Any) -> None:
        """As rich's, if it is one of these."""
        with self._lock:  # loggers warn from threads of their own
            self.quiet = not (style == "yellow" or any(isinstance(thing, Table) for thing in objects))
            try:
                super().print(*objects, style=style, **options)
            finally:
                self.quiet = False


def terminal(*, quiet: bool) -> Console:
    """Standard output. What is not a terminal gets no live display, also where FORCE_COLOR or the like asks for colours."""
    kind = QuietConsole if quiet else Console
    if not sys.stdout.isatty():
        return kind(width=_FILE_WIDTH, force_interactive=False)
    return kind(force_interactive=False if quiet else None)  # None: as rich finds it, by TERM=dumb and others
