"""Progress of long loops: one live picture on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from weakref import WeakKeyDictionary, WeakSet

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.segment import ControlType
from rich.text import Text

from blip2x.engine.run_files import TIMES

SECONDS_BETWEEN_LINES = 5.0  # where output is not a terminal, e.g. a log file
_SECONDS_BETWEEN_PICTURES = 0.125
_LEAST_RATIO = 100  # of the time between two pictures to that of drawing one, also where a terminal is slow
_TREND = 12  # values of a loss part that are drawn
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_BAR = 40  # columns
_LEAST_BAR = 8
_NO_PARTS = ("stage", "step", "lr", "grad_norm", *TIMES)  # what a training's line has beside losses and accuracies
# what of a training's line plain lines leave out: it is theirs already, or of use in curves only
_NOT_SAID = ("stage", "step", "samples_per_second", "seconds", "data_wait_seconds", "images_per_second_per_worker")


class ProgressBar:
    """Steps done of `total`, a rate, the time left, and of a training its newest line and validation, on `console`.

    A loop inside another one, as a validation inside a training, is a row of that one's live picture.
    """

    def __init__(self, console: Console, description: str, total: int, *, unit: str = "samples", start: int = 0):
        self.description, self.total, self.unit, self.done = description, total, unit, start
        self.line: Mapping[str, float] = {}  # the newest one
        self.trends: dict[str, deque[float]] = {}  # of what `line` has beside times
        self.validation: tuple[int, Mapping[str, float]] | None = None  # after which step, and what it gave
        self._console, self._display = console, display_of(console)
        self._first = start
        self._samples = 0
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> ProgressBar:
        self._started = self._last_line = time.monotonic()
        self._display.open(self, self._console)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._display.close(self) and kind is None:
            self._print_line()

    @property
    def samples_per_second(self) -> float:
        """Samples since the start by the time since the start; of a training those of its newest line."""
        return self.line.get("samples_per_second", self._samples / max(time.monotonic() - self._started, 1e-9))

    @property
    def seconds_left(self) -> float:
        """As long as the steps that are left take at the pace of those that were made here; 0 before the first one."""
        steps = self.done - self._first
        return (time.monotonic() - self._started) / steps * (self.total - self.done) if steps else 0.0

    def advance(self, samples: int, line: Mapping[str, float] | None = None) -> None:
        """One step of `samples` samples is done; `line` is what a training writes to metrics.jsonl, where it just has."""
        self.done += 1
        self._samples += samples
        if line is not None:
            self.line = line
            for name, value in line.items():
                if name not in _NO_PARTS and not name.startswith("lr/"):
                    self.trends.setdefault(name, deque(maxlen=_TREND)).append(value)
        if not self._display.draw() and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def validated(self, results: Mapping[str, float]) -> None:
        """A validation after the step that was made last gave `results`."""
        self.validation = (self.done, results)
        if not self._display.draw(now=True) and results:
            self._print([f"{self.description} {self.done}/{self.total} validation", *_pairs(results)])

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        place = self._display.place
        said = {
            **({"stage": place.replace(" of ", "/")} if place else {}),
            f"{self.unit}_per_second": f"{self.samples_per_second:.3g}",
            "seconds_left": f"{self.seconds_left:.0f}",
        }
        line = {name: value for name, value in self.line.items() if name not in _NOT_SAID}
        self._print([f"{self.description} {self.done}/{self.total}", *_pairs(said), *_pairs(line)])

    def _print(self, words: Sequence[str]) -> None:
        self._console.print(" ".join(words), markup=False, highlight=False, soft_wrap=True)


def show_place(console: Console, number: int, count: int) -> None:
    """Say that what comes is stage `number` of `count`, counted from 1."""
    display_of(console).place = f"{number} of {count}"


def show_captions(console: Console, captions: Sequence[str]) -> bool:
    """Put a validation's first captions into the live picture of `console`; false where there is none."""
    return display_of(console).show_captions(captions)


def display_of(console: Console) -> Display:
    """What all progress bars on `console` share."""
    return _displays.setdefault(console, Display())


class Display:
    """The loops that are running on a console, the outermost first, and their live picture if it is a terminal."""

    def __init__(self) -> None:
        self.bars: list[ProgressBar] = []
        self.place = ""  # in a pipeline
        self.captions: Sequence[str] = ()
        self.live: _Live | None = None
        self._next = 0.0  # when to draw again

    def open(self, bar: ProgressBar, console: Console) -> None:
        """A loop begins; with the outermost one the picture."""
        self.bars.append(bar)
        if len(self.bars) == 1 and console.is_terminal and console.is_interactive and not console.quiet:
            self.captions = ()
            self.live = _Live(_Picture(self), console)
            self.live.start()
            _live_displays.add(self)
        self.draw(now=True)

    def close(self, bar: ProgressBar) -> bool:
        """A loop has ended. The outermost one's last picture stays. Gives whether there was a picture."""
        was_live = self.live is not None
        if self.bars[:1] == [bar]:
            self.end()
        elif bar in self.bars:
            self.bars.remove(bar)
            self.draw(now=True)
        return was_live

    def end(self) -> None:
        """Leave the terminal as it was, and the last picture on it, whatever loops there are."""
        live, self.live = self.live, None
        self.bars = self.bars[:1]
        if live:
            live.stop()
        self.bars = []

    def draw(self, *, now: bool = False) -> bool:
        """Draw the picture anew, unless it just was or there is none; gives whether there is one.

        Loops draw, and no thread of its own: loader workers are forks, and might inherit the lock that it holds.
        """
        if self.live is None:
            return False
        began = time.monotonic()
        if now or began >= self._next:
            self.live.refresh()
            ended = time.monotonic()
            self._next = ended + max(_SECONDS_BETWEEN_PICTURES, _LEAST_RATIO * (ended - began))
        return True

    def show_captions(self, captions: Sequence[str]) -> bool:
        """Have them in the picture until it ends; false where there is none."""
        self.captions = tuple(captions)
        return self.draw(now=True)


class _Live(Live):
    """Rich's live display, which also takes away what a terminal that became narrower has broken into more rows."""

    def __init__(self, picture: _Picture, console: Console):
        self._picture = picture
        super().__init__(
            picture,
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),  # what goes to a file still does
            redirect_stderr=sys.stderr.isatty(),
        )

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        more = self._picture.rows(self.console.width) - self._picture.height
        renderables = super().process_renderables(renderables)
        if more <= 0:
            return renderables
        erase = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * more
        return [Control(ControlType.CARRIAGE_RETURN, *erase), *renderables]

    def forget(self) -> None:
        """In a fork: it is the parent's terminal."""
        self._disable_redirect_io()
        self.console.pop_render_hook()
        self.console.clear_live()


class _Picture:
    """The rows for all loops; none is wider than the console, nor are there more than it has."""

    def __init__(self, display: Display):
        self._display = display
        self._widths: list[int] = []  # of the rows that were drawn last, in columns

    @property
    def height(self) -> int:
        """Rows that were drawn last."""
        return len(self._widths)

    def rows(self, width: int) -> int:
        """How many they are by now on a terminal that is `width` columns wide."""
        return sum(max(1, -(-columns // max(width, 1))) for columns in self._widths)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, rows = options.max_width, list(self._rows(console, options))[: max(1, options.size.height - 1)]
        for row in rows:
            row.no_wrap = True
            row.truncate(width, overflow="ellipsis")
        self._widths = [row.cell_len for row in rows]
        yield Text("\n").join(rows)

    def _rows(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        bars, width = self._display.bars, options.max_width
        if not bars:
            return
        first = bars[0]
        yield _bar_row(first, console, options, self._display.place)
        yield from _flow(_parts(first, trends=not options.ascii_only), width)
        yield from _flow(_costs(first), width)
        if first.validation:
            step, results = first.validation
            # of all images: those of groups of them, which have a slash, would fill a small terminal
            scores = [Text(f"{name} {value:.4g}") for name, value in results.items() if "/" not in name]
            yield from _flow([Text(f"validation at {step}", style="bold"), *scores], width)
        for caption in self._display.captions:
            yield Text(f"  {' '.join(caption.split())}", style="dim")
        for bar in bars[1:]:
            yield _bar_row(bar, console, options, "")


def _bar_row(bar: ProgressBar, console: Console, options: ConsoleOptions, place: str) -> Text:
    row = Text.assemble((bar.description, "bold"), f" ({place})" if place else "")
    behind = f" {bar.done}/{bar.total}"
    if bar.done:
        behind += f"  {_duration(bar.seconds_left)} left"
    if not bar.line:  # else it is among the costs
        behind += f"  {bar.samples_per_second:.3g} {bar.unit}/s"
    room = min(_MOST_BAR, options.max_width - row.cell_len - len(behind) - 1)
    if room >= _LEAST_BAR:
        row.append(" ")
        start = row.cell_len
        drawn = Bar(total=max(bar.total, 1), completed=bar.done, width=room)
        for segment in console.render(drawn, options):
            row.append(segment.text, segment.style)
        row.pad_right(start + room - row.cell_len)  # without colours what is left is not drawn
    return row.append(behind)


def _parts(bar: ProgressBar, *, trends: bool) -> list[Text]:
    """Losses and accuracies, each with its last value and how it came there."""
    found = []
    for name, values in bar.trends.items():
        if name in bar.line:
            part = Text.assemble(name, " ", (f"{values[-1]:.4g}", "bold"))
            found.append(part.append(f" {_trend(values)}", "cyan") if trends and len(values) > 1 else part)
    return found


def _trend(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in values)


def _costs(bar: ProgressBar) -> list[Text]:
    line, said = bar.line, []
    if line:
        said.append(f"{_rate(bar.samples_per_second)} {bar.unit}/s")
    if "tokens_per_second" in line:
        said.append(f"{_rate(line['tokens_per_second'])} tokens/s")
    if "data_wait" in line:
        said.append(f"data wait {100 * line['data_wait']:.0f} %")
    if "memory_gb" in line:
        said.append(f"memory {line['memory_gb']:.2f} GB")
    said += [f"{name} {line[key]:.3g}" for key, name in (("lr", "lr"), ("grad_norm", "gradient")) if key in line]
    return [Text(text) for text in said]


def _flow(items: Sequence[Text], width: int) -> Iterator[Text]:
    """`items` in rows of `width` columns, two spaces apart, behind the place of the bars' names."""
    row = Text()
    for item in items:
        if row and row.cell_len + 2 + item.cell_len > width:
            yield row
            row = Text()
        row = Text.assemble(row, "  ", item)
    if row:
        yield row


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _pairs(values: Mapping[str, float | str]) -> list[str]:
    """name=value, to grep for; the names are those of metrics.jsonl."""
    return [f"{name}={value if isinstance(value, str) else f'{value:.4g}'}" for name, value in values.items()]


_displays: WeakKeyDictionary[Console, Display] = WeakKeyDictionary()
_live_displays: WeakSet[Display] = WeakSet()


def _forget_displays() -> None:
    for display in list(_live_displays):
        live, display.live, display.bars = display.live, None, []
        if live:
            live.forget()


os.register_at_fork(after_in_child=_forget_displays)
