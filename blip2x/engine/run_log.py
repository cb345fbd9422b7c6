"""log.txt: all that a run prints, as plain text."""

from __future__ import annotations

import io
import traceback
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control

from blip2x.engine.folders import append_whole

_WIDTH = 120  # columns


class RunLog(RenderHook):
    """What `console` prints goes to a file as well, at once, and so do Python's warnings, until it is closed.

    A quiet console's words are in the file, too; what a live display redraws is not. A disk that is full costs the log's lines
    and not the run.
    """

    def __init__(self, path: Path, console: Console, command: str):
        self._path = path
        self._console = console
        self._works = True
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warning
        console.push_render_hook(self)
        self.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC $ {command}\n")

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by the console for whatever it prints."""
        shown = [renderable for renderable in renderables if not isinstance(renderable, Control)]
        if shown:
            text = io.StringIO()
            plain = Console(file=text, width=_WIDTH, force_terminal=False, color_system=None, emoji=False, highlight=False)
            for renderable in shown:
                plain.print(renderable, soft_wrap=True)
            self.write(text.getvalue())
        return renderables

    def write(self, text: str) -> None:
        """Append `text`, which ends with its own newline."""
        try:
            append_whole(self._path, text)
        except OSError as error:
            if self._works:
                self._works = False  # said once
                self._console.print(f"warning: {self._path.name} lacks lines: {error}", style="yellow", markup=False)

    def traceback(self, error: BaseException) -> None:
        """Append where `error` came from."""
        self.write("".join(traceback.format_exception(error)))

    def close(self) -> None:
        """Leave the console and the warnings as they were."""
        hooks = self._console._render_hooks
        if self in hooks:
            hooks.remove(self)
        if warnings.showwarning == self._warning:
            warnings.showwarning = self._show_warning

    def _warning(self, message: Any, category: type[Warning], filename: str, lineno: int, *others: Any, **named: Any) -> None:
        self.write(warnings.formatwarning(message, category, filename, lineno))
        self._show_warning(message, category, filename, lineno, *others, **named)
