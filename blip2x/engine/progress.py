"""Progress of a long loop: one live bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0  # where output is not a terminal, e.g. a log file


class ProgressBar:
    """Steps done of `total`, a rate, the time left and a free text, on `console`."""

    def __init__(self, console: Console, description: str, total: int, *, unit: str = "samples", start: int = 0):
        self._console = console
        self._description = description
        self._total = total
        self._unit = unit
        self._first = self._done = start
        self._samples = 0
        self._text = ""
        self._started = self._last_line = time.monotonic()
        self._live: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=console,
            )
            self._task = self._live.add_task(description, total=total, completed=start, rate="", text="")

    def __enter__(self) -> ProgressBar:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        elif kind is None:
            self._print_line()

    @property
    def samples_per_second(self) -> float:
        """Samples since the start by the time since the start."""
        return self._samples / max(time.monotonic() - self._started, 1e-9)

    def advance(self, samples: int, text: str | None = None) -> None:
        """One step of `samples` samples is done; `text` replaces what stands beside the bar."""
        self._done += 1
        self._samples += samples
        self._text = self._text if text is None else text
        if self._live:
            self._live.update(self._task, completed=self._done, rate=self._rate(), text=self._text)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def _rate(self) -> str:
        return f"{self.samples_per_second:.3g} {self._unit}/s"

    def _print_line(self) -> None:
        now = self._last_line = time.monotonic()
        steps = self._done - self._first
        left = (now - self._started) / steps * (self._total - self._done) if steps else 0.0
        parts = [f"{self._description} {self._done}/{self._total}", self._rate(), f"{left:.0f} s left", self._text]
        self._console.print("  ".join(part for part in parts if part), markup=False, highlight=False, soft_wrap=True)
