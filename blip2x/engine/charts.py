"""Line charts as inline SVG: text and classes only, so that the page's style sheet colours them for light and dark."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 340, 200  # about the pixels it is shown at
_LEFT, _TOP, _BOTTOM = 48, 10, 36
_RIGHT, _CHARACTER = 54, 6.4  # least room for what stands at a line's end, and the width of a character of it
_MOST_CHARACTERS = 20
MAX_POINTS = 150  # per line: more than a small panel can show
_MAX_DOTS = 30  # so that a line under them can be seen
_LABEL_HEIGHT = 14


def line_chart(title: str, series: Mapping[str, Points], *, dots: Collection[str] = ()) -> Markup:
    """Draw (step, value) points, one line per name, or single dots for the names in `dots`; what is not finite is left out.

    Returns an ``<svg>`` element, or an empty string where nothing is left to draw.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
    lines = {name: (_some if name in dots else _thin)(points) for name, points in finite.items() if points}
    if not lines:
        return Markup("")
    labels = [_label(name if len(lines) > 1 else "", finite[name][-1][1]) for name in lines]
    right = _WIDTH - max(_RIGHT, round(14 + _CHARACTER * max(map(len, labels))))
    x_low, x_high = _span([0.0, *(x for points in lines.values() for x, _ in points)])
    y_low, y_high = _span([y for points in lines.values() for _, y in points], keep_zero=True)
    y_ticks = _ticks(y_low, y_high)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (right - _LEFT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in _ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            x = place(tick, y_low)[0]
            parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 19}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<text class="tick" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    heights = _spread([place(*points[-1])[1] for points in lines.values()])
    for index, ((name, points), label, label_y) in enumerate(zip(lines.items(), labels, heights, strict=True)):
        corners = [place(x, y) for x, y in points]
        last_x, last_y = corners[-1]
        first, last = finite[name][0], finite[name][-1]
        told = f"{name}: {first[1]:.4g} at step {first[0]:.0f}, {last[1]:.4g} at step {last[0]:.0f}"
        parts.append(f'<g class="s{index % 6}"><title>{escape(told)}</title>')
        if name in dots:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in corners]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            parts.append(f'<polyline points="{path}"/><circle cx="{last_x:.1f}" cy="{last_y:.1f}" r="3"/>')
        parts.append(f'<text x="{right + 8}" y="{label_y + 4:.1f}">{escape(label)}</text></g>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _label(name: str, value: float) -> str:
    """What stands at a line's end; the whole name is in the line's title."""
    short = _short(value)
    room = _MOST_CHARACTERS - len(short) - 1
    name = name if len(name) <= room else f"{name[: room - 1]}\u2026"
    return f"{name} {short}" if name else short


def _short(value: float) -> str:
    """Three digits, or all of a count; small numbers, such as learning rates, two and a power of ten: 2.5e-5."""
    if 1e3 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def _tick_texts(ticks: list[float]) -> list[str]:
    texts = [f"{tick / 1000:.4g}k" if 1e4 <= abs(tick) < 1e6 else f"{tick:.4g}" for tick in ticks]
    return texts if max(map(len, texts)) <= 6 else [_short(tick) for tick in ticks]  # what the margin has room for


def _thin(points: Points) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _some(points: Points) -> list[tuple[float, float]]:
    """At most `_MAX_DOTS` of the points as they are, the first and the last among them."""
    count = min(len(points), _MAX_DOTS)
    return [points[round(index * (len(points) - 1) / max(count - 1, 1))] for index in range(count)]


def _span(values: list[float], *, keep_zero: bool = False) -> tuple[float, float]:
    """Where an axis begins and ends; `keep_zero` starts it at 0 unless that would squeeze the line into a strip."""
    low, high = min(values), max(values)
    if keep_zero and 0 <= low < 0.6 * high:
        low = 0.0
    if low == high:  # a constant: leave room on both sides
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that cover the span."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _spread(heights: list[float]) -> list[float]:
    """Move labels apart until none covers another, in order, inside the panel."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for above, below in itertools.pairwise(order):
        placed[below] = max(placed[below], placed[above] + _LABEL_HEIGHT)
    floor = _HEIGHT - _BOTTOM
    for index in reversed(order):
        placed[index] = min(placed[index], floor)
        floor = placed[index] - _LABEL_HEIGHT
    return placed
