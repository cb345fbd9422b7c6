"""Which plots show what differed, and the training curves over one another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from blip2x.engine.charts import Points
from blip2x.engine.compared.charts import Dot, curves, dots_by_name, dots_by_number
from blip2x.engine.compared.differences import SEED, Key
from blip2x.engine.compared.metrics import Column
from blip2x.engine.compared.runs import ComparedRun
from blip2x.engine.comparisons import LOSS_PARTS, stage_title

MOST_ROWS = 24  # names in a plot
COLOURED, GREY = 6, 24  # runs whose curves have a colour, and further ones without
_MOST_METRICS = 12  # with a plot
_MOST_KEYS = 6  # that metrics are plotted over, one at a time
_SIDE = 8  # values of a key in a heat table, at most
_FILLED = 0.5  # of a heat table's fields, at least


@dataclass(frozen=True)
class Panel:
    """A chart with its title."""

    title: str
    chart: Markup
    note: str = ""


@dataclass(frozen=True)
class HeatTable:
    """A metric by two keys: each field (text, heat 0 to 1, whether it is the best), or None where no run was."""

    title: str
    row_key: str
    column_key: str
    column_names: list[str]
    rows: list[tuple[str, list[tuple[str, float, bool] | None]]]


@dataclass(frozen=True)
class Curves:
    """Training curves of one stage."""

    stage: str
    panels: list[Panel]


def axes(keys: Sequence[Key]) -> list[Key]:
    """What plots are drawn over: what differs but seeds, of keys that always change together the first."""
    chosen: dict[object, Key] = {}
    for key in keys:
        if key.lead is None and key.name != SEED:
            groups = [key.values.index(value) for value in key.values]
            # where every run has a value of its own nothing says that two keys belong together
            together = len(groups) == 2 or len(set(groups)) < len(groups)
            chosen.setdefault(tuple(groups) if together else key.name, key)
    return list(chosen.values())


def metric_plots(runs: Sequence[ComparedRun], keys: Sequence[Key], found: Sequence[Column]) -> list[Panel | HeatTable]:
    """A plot per metric that differs, or where three keys or more do, one per metric and key."""
    over = axes(keys)
    plotted = [column for column in found if len(column.ranked()) > 1 and column.differs and "/" not in column.key]
    plotted = sorted(plotted, key=lambda column: not column.headline)[:_MOST_METRICS]
    if not over or len(runs) == 2:
        return [_by_name(column, runs, [run.name for run in runs], "") for column in plotted]
    if len(over) == 1:
        return [_over(column, runs, over[0]) for column in plotted]
    if len(over) == 2 and _fills(over[0], over[1]):
        return [_heat(column, over[0], over[1]) for column in plotted]
    leading = [column for column in plotted if column.headline]
    return [_over(column, runs, key) for column in leading for key in over[:_MOST_KEYS]]


def shown_curves(runs: Sequence[ComparedRun], order: Sequence[int]) -> tuple[list[tuple[str, str]], list[Curves], int]:
    """((run, class) of the legend, curves by stage, runs left out); `order` has the best run first."""
    chosen = [runs[index] for index in order[: COLOURED + GREY]]
    if len(runs) <= COLOURED:
        chosen = [run for run in runs if run in chosen]
    kinds = [f"s{index}" if index < COLOURED else "rest" for index in range(len(chosen))]
    lines: dict[str, dict[str, list[tuple[str, str, Points]]]] = {}
    for run, kind in zip(chosen, kinds, strict=True):
        for stage, parts in _losses(run).items():
            for part, points in parts.items():
                lines.setdefault(stage, {}).setdefault(part, []).append((run.name, kind, points))
    stages = []
    for stage, parts in lines.items():
        # a loss that was measured once, at the end, is no curve
        shared = {part: drawn for part, drawn in parts.items() if sum(len(points) > 1 for _, _, points in drawn) > 1}
        charts = {part: curves(f"{stage_title(stage)}: {part}", shared[part]) for part in _ordered(shared)}
        panels = [Panel(part.replace("_", " "), chart) for part, chart in charts.items() if chart]
        stages += [Curves(stage_title(stage), panels)] if panels else []
    drawn = {name for parts in lines.values() for found in parts.values() for name, _, points in found if len(points) > 1}
    legend = [(run.name, kind) for run, kind in zip(chosen, kinds, strict=True) if run.name in drawn]
    return legend if stages else [], stages, len(order) - len(chosen)


def _ordered(parts: dict) -> list[str]:
    return sorted(parts, key=lambda part: (LOSS_PARTS.index(part) if part in LOSS_PARTS else len(LOSS_PARTS), part))


def _losses(run: ComparedRun) -> dict[str, dict[str, Points]]:
    """By stage, points (step, value) of the loss, its parts and the validations' losses."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for row in run.log:
        for name, value in row.items():
            is_loss = name in LOSS_PARTS or (name.endswith("loss") and not name.startswith("blind"))
            if is_loss and isinstance(value, (int, float)) and not isinstance(value, bool):
                # a repeated step is a resumed run's: the later line holds
                found.setdefault(row["stage"], {}).setdefault(name, {})[row["step"]] = float(value)
    return {stage: {name: sorted(points.items()) for name, points in parts.items()} for stage, parts in found.items()}


def _dots(column: Column, runs: Sequence[ComparedRun]) -> dict[int, Dot]:
    dots = {}
    for index in column.ranked():
        cell = column.cells[index]
        in_unit = cell.measure.percent if cell.measure.is_share else float
        interval = tuple(map(in_unit, cell.measure.interval)) if cell.measure.shown_interval() else None
        text = f"{cell.measure.shown()} {cell.measure.shown_interval()}".rstrip()
        dots[index] = Dot(runs[index].name, in_unit(cell.measure.value), text, interval, cell.best, cell.final)
    return dots


def _title(column: Column) -> str:
    is_share = next(iter(column.cells.values())).measure.is_share
    return f"{column.title}, %" if is_share else column.title


def _over(column: Column, runs: Sequence[ComparedRun], key: Key) -> Panel:
    if not key.numbers:
        return _by_name(column, runs, key.texts, key.title, key.choices)
    dots = [(key.numbers[index], dot) for index, dot in sorted(_dots(column, runs).items())]
    title = f"{_title(column)} by {key.title}"
    return Panel(title, dots_by_number(title, key.title, dots))


def _by_name(column: Column, runs: Sequence[ComparedRun], names: Sequence[str], title: str, order: Sequence[str] = ()) -> Panel:
    rows: dict[str, list[Dot]] = {name: [] for name in order}
    for index, dot in _dots(column, runs).items():  # best first
        rows.setdefault(names[index], []).append(dot)
    rows = {name: dots for name, dots in rows.items() if dots}
    shown = list(rows.items())
    note = ""
    if len(rows) > MOST_ROWS:
        best = sorted(shown, key=lambda row: -column.better * statistics.fmean(dot.value for dot in row[1]))
        shown, note = best[:MOST_ROWS], f"The first {MOST_ROWS} of {len(rows)}, best first."
    label = f"{_title(column)} by {title}" if title else _title(column)
    return Panel(label, dots_by_name(label, shown), note)


def _fills(first: Key, second: Key) -> bool:
    fields = len(first.choices) * len(second.choices)
    taken = len(set(zip(first.values, second.values, strict=True)))
    return max(len(first.choices), len(second.choices)) <= _SIDE and taken >= _FILLED * fields


def _heat(column: Column, rows: Key, across: Key) -> HeatTable:
    """Means of the finished runs; where all that are there did not finish, nothing."""
    fields: dict[tuple[str, str], list[float]] = {}
    for index in column.ranked():
        if column.cells[index].final:
            place = rows.texts[index], across.texts[index]
            fields.setdefault(place, []).append(column.cells[index].measure.value)
    means = {place: statistics.fmean(values) for place, values in fields.items()}
    low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
    best = {1: high, -1: low}.get(column.better, math.nan)
    measure = next(iter(column.cells.values())).measure

    def field(place: tuple[str, str]) -> tuple[str, float, bool] | None:
        if place not in means:
            return None
        heat = (means[place] - low) / (high - low) if high > low else 0.0
        heat = 1 - heat if column.better < 0 else heat
        return measure.shown(means[place]), round(heat, 3), high > low and means[place] == best

    body = [(row, [field((row, name)) for name in across.choices]) for row in rows.choices]
    return HeatTable(column.title, rows.title, across.title, across.choices, body)
