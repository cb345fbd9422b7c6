"""A plan as rows: what is recommended on how many GPUs, and every layout beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from blip2x.models.plan.assumptions import COUNTS, GIB, Machine
from blip2x.models.plan.choose import best_of, layouts, recommend
from blip2x.models.plan.estimate import Estimate, Training
from blip2x.models.plan.traffic import Layout

COLUMNS = ("GPUs", "layout", "rows x micro-batches", "step, s", "exchange, s", "GiB", "samples/s", "of peak", "cores", "hours")


def recommended(training: Training, machine: Machine, counts: Sequence[int] = COUNTS) -> dict[int, Estimate | None]:
    """By number of GPUs; None: it does not fit, or there are not as many samples as ranks."""
    return {count: recommend(training, machine, count) for count in counts}


def compared(training: Training, machine: Machine, count: int) -> dict[Layout, Estimate | None]:
    """Every layout of `count` GPUs, the simplest first."""
    return {layout: best_of(training, machine, layout) for layout in layouts(training, machine, count)}


def hours(training: Training, found: Estimate) -> float | None:
    """Of as many samples as the whole training sees; None: it is not known how many."""
    if training.steps is None:
        return None
    return training.steps * training.samples / found.samples_per_second / 3600


def cells(training: Training, count: int, found: Estimate | None, layout: Layout | None = None) -> list[str]:
    """A row of `COLUMNS`; `layout` names one that does not fit."""
    if found is None:
        return [str(count), name(layout) if layout else "none", "does not fit", *[""] * (len(COLUMNS) - 3)]
    spent = hours(training, found)
    return [
        str(count),
        name(found.layout),
        f"{found.batch.rows} x {found.batch.accumulate}",
        f"{found.step:.3f}",
        f"{found.sending:.3f}",
        f"{found.memory / GIB:.1f}",
        f"{found.samples_per_second:,.0f}",
        f"{100 * found.peak_share:.0f} %",
        f"{found.cores:.1f}",
        "" if spent is None else f"{spent:,.1f}",
    ]


def name(layout: Layout) -> str:
    """As its options are called: dp, sharding2, tp2; with a product its degrees."""
    own = layout.degrees
    parts = []
    if own.sharding > 1:
        parts.append(f"sharding{layout.stage}" + (f" over {own.sharding}" if own.dp > 1 else ""))
    if own.tp > 1:
        parts.append(f"tp{own.tp}")
    if layout.ranks == 1:
        return "single"
    return " x ".join([*(["dp"] if own.dp > 1 or not parts else []), *parts])


def options(layout: Layout) -> str:
    """The words of a command that choose it."""
    own = layout.degrees
    if layout.ranks == 1:
        return "parallelism=single"
    base = f"sharding{layout.stage}" if layout.stage else f"tp{own.tp}" if own.tp > 1 else "dp"
    words = [f"parallelism={base}"]
    if layout.stage:
        words += [f"parallelism.dp={own.dp}", f"parallelism.sharding={own.sharding}"] if own.dp > 1 else []
        words += [f"parallelism.tp={own.tp}"] if own.tp > 1 else []
    return " ".join(words)


def record(training: Training, found: Estimate | None) -> dict[str, Any] | None:
    """For plan.json: seconds, bytes and numbers, nothing rounded."""
    if found is None:
        return None
    values = asdict(found)
    values |= {"step": found.step, "samples_per_second": found.samples_per_second, "hours": hours(training, found)}
    return {**values, "options": options(found.layout)}


def markdown(rows: Iterable[Sequence[str]], columns: Sequence[str] = COLUMNS) -> list[str]:
    """A table of a page."""
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
