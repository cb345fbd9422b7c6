"""Charts of several runs as inline SVG: text and classes only, which the page's style sheet colours for light and dark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from blip2x.engine.charts import Points, _short, _span, _thin, _tick_texts, _ticks
from blip2x.engine.compared.differences import shortened

_WIDTH, _HEIGHT = 340, 200  # about the pixels it is shown at
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 36
_ROW, _LABEL, _VALUE = 22, 124, 62  # of dots by name: height of a row; widths of its label and of its value
_LETTERS = 18  # of a label, at most
_LOG_FROM = 10  # times the smallest value of an axis, from which on it is one of powers of ten
_MOST_TICKS = 6


@dataclass(frozen=True)
class Dot:
    """A run's value of a metric."""

    run: str
    value: float
    text: str  # the value in the metric's unit, with its interval
    interval: tuple[float, float] | None
    best: bool
    final: bool

    @property
    def kind(self) -> str:
        """Class in the style sheet."""
        return "best" if self.best else "dot" if self.final else "unfinished"


def dots_by_name(title: str, rows: Sequence[tuple[str, Sequence[Dot]]]) -> Markup:
    """A row per name with its runs' dots and 95 % intervals on one scale; of several runs the row's value is their mean."""
    low, high = _span(_ends([dot for _, dots in rows for dot in dots]), keep_zero=True)
    left, right, height = _LABEL + 6, _WIDTH - _VALUE - 6, _ROW * len(rows) + 20  # 6: half a dot and some air

    def x_of(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    parts = [f'<svg class="chart dots" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    for value, anchor in ((low, "start"), (high, "end")):
        parts.append(f'<line class="grid" x1="{x_of(value):.1f}" x2="{x_of(value):.1f}" y1="2" y2="{height - 16}"/>')
        parts.append(f'<text class="tick" x="{x_of(value):.1f}" y="{height - 3}" text-anchor="{anchor}">{_short(value)}</text>')
    for index, (name, dots) in enumerate(rows):
        y = _ROW * index + _ROW / 2 + 2
        parts.append(f'<text x="0" y="{y + 4:.1f}"><title>{escape(name)}</title>{escape(shortened(name, _LETTERS))}</text>')
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for dot in dots:
            ends = [x_of(end) for end in dot.interval] if dot.interval else []
            bar = f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>' if ends else ""
            parts.append(_marked(dot, x_of(dot.value), y, bar))
        best = len(dots) == 1 and dots[0].best
        value = _short(statistics.fmean(dot.value for dot in dots))
        parts.append(f'<text class="value{" best" if best else ""}" x="{right + 12}" y="{y + 4:.1f}">{value}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def dots_by_number(title: str, axis: str, dots: Sequence[tuple[float, Dot]]) -> Markup:
    """Values over a number of the config, and a line through the means of the runs that have it alike and came to their end.

    The axis is one of powers of ten where its largest number is ten times the smallest or more.
    """
    numbers = sorted({x for x, _ in dots})
    is_log = numbers[0] > 0 and numbers[-1] >= _LOG_FROM * numbers[0]
    scale = math.log10 if is_log else float
    x_low, x_high = _span([scale(x) for x in numbers])
    room = 0.04 * (x_high - x_low)  # for a dot
    x_low, x_high = x_low - room, x_high + room
    y_low, y_high = _span(_ends([dot for _, dot in dots]), keep_zero=True)
    y_ticks = _ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    right = _WIDTH - _RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (scale(x) - x_low) / (x_high - x_low) * (right - _LEFT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = _frame(title, y_ticks, lambda tick: place(numbers[0], tick)[1], axis + (" (log scale)" if is_log else ""))
    last = -math.inf
    for tick in numbers if len(numbers) <= _MOST_TICKS else _axis_ticks(numbers, is_log):
        x, text = place(tick, y_low)[0], _short(tick)
        if x - last > 7 * len(text):  # else one would cover the other
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 19}" text-anchor="middle">{text}</text>')
            last = x
    final = {x: [dot.value for at, dot in dots if at == x and dot.final] for x in numbers}
    means = [place(x, statistics.fmean(values)) for x, values in final.items() if values]
    if len(means) > 1:
        parts.append(f'<polyline class="means" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in means)}"/>')
    for number, dot in dots:
        x, y = place(number, dot.value)
        ends = [place(number, end)[1] for end in dot.interval] if dot.interval else []
        bar = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>' if ends else ""
        parts.append(_marked(dot, x, y, bar))
    parts.append("</svg>")
    return Markup("".join(parts))


def curves(title: str, lines: Sequence[tuple[str, str, Points]]) -> Markup:
    """(run, class, points (step, value)) over one another, the first on top; an empty string where no point is finite."""
    finite = [(name, kind, [(x, y) for x, y in points if math.isfinite(y)]) for name, kind, points in lines]
    finite = [line for line in finite if line[2]]
    if not finite:
        return Markup("")
    x_low, x_high = _span([0.0, *(x for _, _, points in finite for x, _ in points)])
    y_low, y_high = _span([y for _, _, points in finite for _, y in points], keep_zero=True)
    y_ticks = _ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    right = _WIDTH - _RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = _frame(title, y_ticks, lambda tick: place(0, tick)[1], "step")
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            x = place(tick, y_low)[0]
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 19}" text-anchor="middle">{tick:,.0f}</text>')
    for name, kind, points in reversed(finite):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in _thin(points)))
        last_x, last_y = place(*points[-1])
        told = escape(f"{name}: {points[-1][1]:.4g} at step {points[-1][0]:.0f}")
        parts.append(f'<g class="{kind}"><title>{told}</title><polyline points="{path}"/>')
        parts.append(f'<circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="2.5"/></g>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _frame(title: str, y_ticks: list[float], y_of: Callable[[float], float], axis: str) -> list[str]:
    right = _WIDTH - _RIGHT
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y_of(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(axis)}</text>')
    return parts


def _marked(dot: Dot, x: float, y: float, bar: str) -> str:
    told = escape(f"{dot.run}: {dot.text}{'' if dot.final else ', not finished'}")
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if dot.best else 3.2}"/>'
    return f'<g class="{dot.kind}"><title>{told}</title>{bar}{circle}</g>'


def _ends(dots: Sequence[Dot]) -> list[float]:
    return [end for dot in dots for end in (dot.value, *(dot.interval or ()))]


def _axis_ticks(numbers: list[float], is_log: bool) -> list[float]:
    if not is_log:
        return [tick for tick in _ticks(numbers[0], numbers[-1]) if numbers[0] <= tick <= numbers[-1]]
    first, last = math.ceil(math.log10(numbers[0]) - 1e-9), math.floor(math.log10(numbers[-1]) + 1e-9)
    powers = [10.0**power for power in range(first, last + 1)]
    return powers if len(powers) > 1 else [numbers[0], numbers[-1]]
