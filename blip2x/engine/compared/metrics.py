"""The metrics of several runs side by side: which direction is good, who is best, and who is as good within the interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blip2x.engine.compared.differences import SEED, Key
from blip2x.engine.compared.runs import ComparedRun
from blip2x.engine.comparisons import HEADLINES, HIGHER, Measure, direction, metric_title, stage_title

COST = "cost"  # stands for a stage in cost columns


@dataclass(frozen=True)
class Cell:
    """A run's value of a metric."""

    measure: Measure
    final: bool  # false: of a run that did not come to its end, so that it takes no part
    best: bool = False
    close: bool = False  # not the best, but its interval and the best's overlap
    times: float | None = None  # of a rate or a time that is not the best: what it is times the best


@dataclass(frozen=True)
class Column:
    """A metric; `cells` by the run's place among the runs, where it has any."""

    stage: str  # "" where runs of different tasks are compared by one metric
    key: str
    name: str
    group: str  # the stage's title, where there are several
    label: str
    headline: bool
    cells: dict[int, Cell]

    @property
    def title(self) -> str:
        """All of its name for readers."""
        return f"{self.group}, {self.label}" if self.group else self.label

    @property
    def differs(self) -> bool:
        """Whether runs that have it do not all have the same value."""
        return len({cell.measure.value for cell in self.cells.values()}) > 1

    @property
    def better(self) -> int:
        """Which direction is good."""
        return direction(self.name)

    @property
    def is_pace(self) -> bool:
        """Whether it is a rate, or the time that a step or a part of it takes, of which ratios are what one asks for."""
        return self.name.endswith(("_per_second", "_seconds"))

    def ranked(self) -> list[int]:
        """Places of the runs with a finite value, best first (else by their order), those that did not finish last."""
        found = [index for index, cell in self.cells.items() if math.isfinite(cell.measure.value)]
        return sorted(found, key=lambda i: (not self.cells[i].final, -self.better * self.cells[i].measure.value, i))


def columns(runs: Sequence[ComparedRun]) -> list[Column]:
    """Metrics in the order of the files, and what the runs cost."""
    stages = [{measure.stage for measure in run.measures} for run in runs]
    # runs of one task each, of which there are several: an accuracy is an accuracy, whichever task it is of
    merged = all(len(own) <= 1 for own in stages) and len(set().union(*stages)) > 1
    found: dict[tuple[str, str], dict[int, Cell]] = {}
    for index, run in enumerate(runs):
        for measure in run.measures:
            stage = "" if merged and direction(measure.name) == HIGHER else measure.stage
            found.setdefault((stage, measure.key), {})[index] = Cell(measure, run.complete)
    several = len({stage for stage, _ in found}) > 1
    headlines = _headlines(found)
    metrics = []
    for (stage, key), cells in found.items():
        measure = next(iter(cells.values())).measure
        pieces = [measure.scope.replace("_", " "), metric_title(measure.name), measure.part]
        group = stage_title(stage) if several and stage else ""
        label = ", ".join(filter(None, pieces))
        metrics.append(Column(stage, key, measure.name, group, label, (stage, key) in headlines, cells))
    return [_judge(column) for column in [*metrics, *_costs(runs)]]


def _headlines(found: dict[tuple[str, str], dict[int, Cell]]) -> set[tuple[str, str]]:
    by_stage: dict[str, list[tuple[str, str]]] = {}
    for place, cells in found.items():
        measure = next(iter(cells.values())).measure
        if not measure.scope and not measure.part:
            by_stage.setdefault(place[0], []).append(place)
    chosen: set[tuple[str, str]] = set()
    for places in by_stage.values():
        chosen |= {place for place in places if place[1] in HEADLINES} or set(places[:1])
    return chosen


def primary(found: Sequence[Column]) -> Column | None:
    """The metric that runs are ordered by: a headline of the last stage that most of the finished runs have come to."""
    metrics = [column for column in found if column.headline and column.better and column.stage != COST]

    def weight(column: Column) -> tuple[int, bool, int, int]:
        finished = sum(cell.final for cell in column.cells.values())
        order = HEADLINES.index(column.name) if column.name in HEADLINES else len(HEADLINES)
        last = max(index for index, other in enumerate(metrics) if other.stage == column.stage)
        return finished, column.name in HEADLINES, last, -order

    return max(metrics, key=weight, default=None)


def _costs(runs: Sequence[ComparedRun]) -> list[Column]:
    made = []
    for key, title in (("seconds", "seconds"), ("peak_memory_gb", "peak memory, GB")):
        cells = {}
        for index, run in enumerate(runs):
            value = getattr(run, key)
            if value is not None:
                final = run.complete and not (run.resumed and key == "seconds")
                cells[index] = Cell(Measure(COST, "", key, "", value, ()), final)
        made += [Column(COST, key, key, "", title, True, cells)] if cells else []
    return made


def _judge(column: Column) -> Column:
    """With marks for the best and for what is as good, where at least two finished runs differ."""
    final = {i: cell.measure for i, cell in column.cells.items() if cell.final and math.isfinite(cell.measure.value)}
    values = {measure.value for measure in final.values()}
    if not column.better or len(values) < 2:
        return column
    best = max(values, key=lambda value: column.better * value)
    intervals = [measure.interval for measure in final.values() if measure.value == best and measure.interval]
    cells = dict(column.cells)
    for index, measure in final.items():
        is_best = measure.value == best
        own = measure.interval
        close = not is_best and own is not None and any(own[0] <= high and low <= own[1] for low, high in intervals)
        times = measure.value / best if column.is_pace and not is_best and best else None
        cells[index] = replace(cells[index], best=is_best, close=close, times=times)
    return replace(column, cells=cells)


@dataclass(frozen=True)
class SeedCell:
    """A metric over the seeds of a group, in the metric's unit."""

    text: str
    best: bool


@dataclass(frozen=True)
class SeedGroup:
    """Finished runs that differ in nothing but their seed."""

    values: tuple[str, ...]  # of the other keys
    runs: tuple[int, ...]
    means: dict[str, tuple[float, float, int]]  # by column title: mean, standard deviation (of a sample), runs


def seed_groups(runs: Sequence[ComparedRun], keys: Sequence[Key], found: Sequence[Column]) -> list[SeedGroup]:
    """The groups in the order of their keys' values; empty where no group has two seeds."""
    seeds = next((key.values for key in keys if key.name == SEED), None)
    others = [key for key in keys if key.name != SEED]
    if seeds is None:
        return []
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, run in enumerate(runs):
        if run.complete and run.config:
            groups.setdefault(tuple(key.texts[index] for key in others), []).append(index)
    if not any(len({seeds[index] for index in group}) > 1 for group in groups.values()):
        return []
    places = [{value: place for place, value in enumerate(key.choices)} for key in others]
    ordered = sorted(groups.items(), key=lambda group: [where[value] for where, value in zip(places, group[0], strict=True)])
    made = []
    for values, group in ordered:
        members = list({seeds[index]: index for index in group}.values())  # a repeat of a run is no further sample
        means = {}
        for column in found:
            numbers = [column.cells[i].measure.value for i in members if i in column.cells and column.cells[i].final]
            numbers = [number for number in numbers if math.isfinite(number)]
            if numbers:
                deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
                means[column.title] = (statistics.fmean(numbers), deviation, len(numbers))
        leads = tuple(value for key, value in zip(others, values, strict=True) if key.lead is None)
        made.append(SeedGroup(leads, tuple(members), means))
    return made


def seed_cells(groups: Sequence[SeedGroup], column: Column) -> list[SeedCell]:
    """`column` in each group as mean, deviation and number of runs."""
    measure = next(iter(column.cells.values())).measure
    means = [group.means.get(column.title) for group in groups]
    known = {found[0] for found in means if found}
    best = max(known, key=lambda value: column.better * value) if column.better and len(known) > 1 else None
    cells = []
    for found in means:
        if found is None:
            cells.append(SeedCell("", False))
            continue
        mean, deviation, count = found
        spread = "" if math.isnan(deviation) else f" \u00b1 {measure.shown(deviation).removesuffix(' %')}"
        cells.append(SeedCell(f"{measure.shown(mean).removesuffix(' %') if spread else measure.shown(mean)}{spread}"
                              f"{' %' if spread and measure.is_share else ''} ({count})", mean == best))  # fmt: skip
    return cells
