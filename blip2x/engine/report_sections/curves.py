"""Curves of a run: what belongs together is drawn together."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from markupsafe import Markup

from blip2x.engine.charts import MAX_POINTS, line_chart
from blip2x.engine.comparisons import BASELINES, LOSS_PARTS, metric_title, parse_key, stage_title
from blip2x.engine.report_sections.rows import Row, by, is_number
from blip2x.optim.schedule import planned_rates

MAX_LINES = 6  # in a panel: the colours that can be told apart

_TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "temperature": "temperature of the contrast",
    "eval_temperature": "temperature of the contrast, at validation",
    "skipped_steps": "steps skipped so far",
}
_SPEED_TITLES = {
    "samples_per_second": "samples per second",
    "tokens_per_second": "tokens per second",
    "images_per_second_per_worker": "pictures per second and loading worker",
    "data_wait": "waiting for data, share of time",
    "data_wait_seconds": "waiting for data, seconds",
    "memory_gb": "memory, GB",
}
_FIRST = ("lr", "grad_norm", "temperature")  # after the loss; the rest by name
_PLAIN = ("this run", "all")  # a metric's own line, alone or beside baselines, and beside groups
_NOT_CURVES = ("stage", "step", "seconds")

Series = dict[str, dict[int, float]]  # key of metrics.jsonl -> step -> value


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    chart: Markup
    note: str  # what the chart leaves out


@dataclass(frozen=True)
class StageCurves:
    """The charts of one stage."""

    learning: list[Panel]
    speed: list[Panel]


def stage_curves(metrics: list[Row], schedules: dict[str, Row], finished: Collection[str]) -> dict[str, StageCurves]:
    """Each stage's panels: loss parts together, groups and baselines of a metric together, all else one by one.

    The learning rate is drawn as it was planned, with dots for what was logged.

    Args:
        metrics: lines of metrics.jsonl.
        schedules: by stage, the arguments of its learning rate.
        finished: stages whose results are known; what these measured once is no curve.
    """
    stages = {}
    for stage, rows in by(metrics, "stage").items():
        series: Series = {}
        for row in rows:
            for name, value in row.items():
                if name not in _NOT_CURVES and isinstance(row.get("step"), int) and (value is None or is_number(value)):
                    # a repeated step is a resumed run's: the later line holds
                    series.setdefault(name, {})[row["step"]] = math.nan if value is None else float(value)
        speed = [_panel(stage, title, {name: series[name]}) for name, title in _SPEED_TITLES.items() if name in series]
        learning = []
        for name, (title, lines) in _panels({name: line for name, line in series.items() if name not in _SPEED_TITLES}).items():
            if stage in finished and all(len(line) < 2 for line in lines.values()):
                continue
            learning.append(_panel(stage, title, lines, schedules.get(stage) if name == "lr" else None))
        if learning or speed:
            stages[stage] = StageCurves(learning, speed)
    return stages


def _panels(series: Series) -> dict[str, tuple[str, Series]]:
    """Panels by the name of their metric: (title, lines by their names in the panel)."""
    parts = [name for name in LOSS_PARTS if name in series]
    panels = {"loss": ("loss" if len(parts) < 2 else "loss and its parts", {name: series[name] for name in parts})}
    whole = {parse_key(name, ())[1][1] for name in series if "/" not in name}
    plain = _PLAIN[any("/" in name for name in series)]
    others: dict[str, Series] = {}
    for name, line in series.items():
        kind, (scope, metric, part) = parse_key(name, whole)
        if scope and metric not in whole:  # lr/<group>, where there is no lr
            scope, metric, part = "", scope, name.partition("/")[2]
        is_type = part and metric.endswith("accuracy")  # these have a table
        if name in parts or kind not in ("", *BASELINES) or not metric or is_type:
            continue
        said = (scope.replace("_", " "), part, BASELINES.get(kind, ""))
        others.setdefault(metric, {})[", ".join(filter(None, said)) or plain] = line
    order = sorted(others, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    panels |= {name: (_TITLES.get(name, metric_title(name)), others[name]) for name in order}
    return {name: panel for name, panel in panels.items() if panel[1]}


def _panel(stage: str, title: str, lines: Series, schedule: Row | None = None) -> Panel:
    notes = []
    gaps = sum(not math.isfinite(value) for line in lines.values() for value in line.values())
    if gaps:
        notes.append(f"{gaps} value{'s' if gaps > 1 else ''} not a finite number")
    planned = _planned(schedule)
    room = MAX_LINES - bool(planned)
    if len(lines) > room:
        notes.append(f"{room} of {len(lines)} lines, evenly chosen")
        names = list(lines)
        lines = {name: lines[name] for name in (names[round(n * (len(names) - 1) / (room - 1))] for n in range(room))}
    drawn = {name if len(lines) > 1 else title: sorted(line.items()) for name, line in lines.items()}
    if planned:
        drawn = {"plan": planned, **{"logged" if name in (*_PLAIN, title) else name: line for name, line in drawn.items()}}
    return Panel(title, line_chart(f"{stage_title(stage)}: {title}", drawn, dots=["logged"]), "; ".join(notes))


def _planned(shape: Row | None) -> list[tuple[int, float]]:
    try:
        return planned_rates(MAX_POINTS - 1, **shape) if shape else []
    except (TypeError, KeyError, ValueError, ZeroDivisionError):  # not what a training writes: the logged rates remain
        return []
