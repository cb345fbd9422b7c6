"""Several run folders -> one table in the terminal, comparison.html, comparison.csv and comparison.json."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from blip2x.engine.compared import plots
from blip2x.engine.compared.differences import Key, counted, differing, differing_versions, shortened
from blip2x.engine.compared.metrics import COST, Column, SeedGroup, columns, primary, seed_cells, seed_groups
from blip2x.engine.compared.runs import ComparedRun, Scalar, is_comparison, is_run, read_runs
from blip2x.engine.compared.table import CLOSE, comparison_table
from blip2x.engine.folders import write_whole
from blip2x.errors import UserError
from blip2x.pages import render_page

_FEW = 8  # runs that fit beside one another as columns
_LEVELS = 2  # of folders that are searched for runs
_PATTERN = set("*?[")


def find_runs(runs: str | Sequence[str], console: Console | None = None) -> list[Path]:
    """The run folders that `runs` names: runs, folders of them (one or two levels up), or patterns; each once, in order.

    Comparisons are left out: they lie beside what they compare. So are folders that cannot be read, with a line on `console`.

    Raises:
        UserError: something that is named is not there, or there is no run in any of it.
    """
    names = [runs] if isinstance(runs, str) else list(runs)
    found: dict[Path, Path] = {}
    unread: list[str] = []
    for name in names:
        start = Path(name).expanduser()
        if os.path.exists(start):
            places = [start]
        elif _PATTERN & set(name):
            places = [Path(path) for path in sorted(glob.glob(str(start)))]
        else:
            raise UserError(f"runs={name} does not exist; give a folder of runs, a run, a pattern, or a list of them")
        for place in places:
            for folder in _search(place, _LEVELS, unread):
                found.setdefault(folder.resolve(), folder)
    for sentence in unread if console else ():
        console.print(f"warning: {sentence}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not found:
        raise UserError(
            f"no run in {', '.join(map(str, names))}: a run's folder has a config.yaml, and it was looked for there and "
            f"{_LEVELS} levels below{''.join(f'; {sentence}' for sentence in unread[:1])}"
        )
    return list(found.values())


def _search(folder: Path, levels: int, unread: list[str]) -> list[Path]:
    try:
        if is_run(folder):
            return [] if is_comparison(folder) else [folder]
        if not levels or not folder.is_dir():
            return []
        inner = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        unread.append(f"{folder} cannot be read: {error.strerror or error}")
        return []
    return [run for path in inner for run in _search(Path(path), levels - 1, unread)]


def write_comparison(runs: Sequence[Path], target: Path, console: Console) -> Path:
    """Print the table of `runs` and write comparison.html, .csv and .json into the folder `target`.

    The same files give the same page. Files that cannot be read cost their run a note.

    Returns:
        The page.
    """
    comparison = Comparison.of(runs)
    comparison.print(console)
    return comparison.write(target)


@dataclass(frozen=True)
class Comparison:
    """What was read of runs, set beside one another."""

    runs: list[ComparedRun]
    keys: list[Key]  # in which their configs differ
    columns: list[Column]
    order: list[int]  # places of the runs, best first by the primary metric, those that did not finish last
    primary: Column | None
    seeds: list[SeedGroup]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Comparison:
        """Read the run folders."""
        runs = read_runs(folders)
        keys, found = differing(runs), columns(runs)
        first = primary(found)
        ranked = first.ranked() if first else []
        rest = [index for index in range(len(runs)) if index not in set(ranked)]
        order = sorted([*ranked, *rest], key=lambda index: not runs[index].complete)
        return cls(runs, keys, found, order, first, seed_groups(runs, keys, found))

    def print(self, console: Console) -> None:
        """Print the table, and what kept runs from their end."""
        console.print(comparison_table(self.runs, self.keys, self.columns, self.order, self.primary, console.width))
        for run in self.runs:
            if run.error:
                console.print(f"{run.name}: {run.error}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def write(self, target: Path) -> Path:
        """Write the three files into `target` and return the page."""
        page = target / "comparison.html"
        write_whole(page, self._html(target))
        write_whole(target / "comparison.csv", self._csv())
        write_whole(target / "comparison.json", json.dumps(self._json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return page

    def _html(self, target: Path) -> str:
        legend, curves, left_out = plots.shown_curves(self.runs, self.order)
        headlines = [column for column in self.columns if column.headline]
        telling = [column for column in headlines if column.differs or len(column.cells) == 1]
        runs = self.runs
        return render_page(
            Path(__file__).with_name("compare.html.jinja"),
            {"shortened": shortened, "is_heat": lambda panel: isinstance(panel, plots.HeatTable)},
            runs=runs,
            order=self.order,
            links={i: quote(os.path.relpath(run.report, target)) for i, run in enumerate(runs) if run.report},
            leading=[key for key in self.keys if key.lead is None],
            led=[key for key in self.keys if key.lead is not None],
            few=len(runs) <= _FEW,
            value_counts={key.name: counted(Counter(key.texts)) for key in self.keys},
            headlines=telling or headlines,
            primary=self.primary,
            columns=[column for column in self.columns if column.stage != COST],
            has_close=any(cell.close for column in self.columns for cell in column.cells.values()),
            close=CLOSE,
            seeds=self.seeds,
            seed_keys=[key for key in self.keys if key.lead is None and key.name != "seed"],
            seed_columns=[(column, seed_cells(self.seeds, column)) for column in telling] if self.seeds else [],
            panels=plots.metric_plots(runs, self.keys, self.columns),
            legend=legend,
            curves=curves,
            curves_left_out=left_out,
            unfinished=[run for run in runs if not run.complete],
            states=Counter(run.state for run in runs),
            noted=[run for run in runs if run.notes],
            versions=differing_versions(runs),
        )

    def _csv(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        metrics = [column for column in self.columns if column.stage != COST]
        with_ends = {id(c) for c in metrics if any(cell.measure.interval for cell in c.cells.values())}
        heads = []
        for column in metrics:
            name = f"{column.stage}/{column.key}".lstrip("/")
            heads += [name, f"{name} ci95_low", f"{name} ci95_high"] if id(column) in with_ends else [name]
        costs = ["seconds", "peak_memory_gb"]
        writer.writerow(["run", "folder", "state", "error", *(key.name for key in self.keys), *heads, *costs])
        for index in self.order:
            run = self.runs[index]
            figures: list[Any] = []
            for column in metrics:
                cell = column.cells.get(index)
                figures.append(cell.measure.value if cell else "")
                if id(column) in with_ends:
                    figures += (cell and cell.measure.interval) or ("", "")
            row = [run.name, run.folder, run.state, run.error, *(key.values[index] for key in self.keys), *figures]
            writer.writerow([*row, *("" if value is None else value for value in (run.seconds, run.peak_memory_gb))])
        return file.getvalue()

    def _json(self) -> dict[str, Any]:
        made = []
        for index in self.order:
            run = self.runs[index]
            metrics: dict[str, dict[str, Any]] = {}
            for measure in run.measures:
                interval = [_plain(end) for end in measure.interval] if measure.interval else None
                metrics.setdefault(measure.stage, {})[measure.key] = {"value": _plain(measure.value), "ci95": interval}
            made.append(
                {
                    "run": run.name,
                    "folder": str(run.folder),
                    "state": run.state,
                    "error": run.error or None,
                    "differs": {key.name: _plain(run.config[key.name]) for key in self.keys if key.name in run.config},
                    "metrics": metrics,
                    "seconds": run.seconds,
                    "peak_memory_gb": run.peak_memory_gb,
                    "notes": run.notes,
                }
            )
        best = {
            f"{column.stage}/{column.key}".lstrip("/"): [self.runs[i].name for i, cell in column.cells.items() if cell.best]
            for column in self.columns
            if any(cell.best for cell in column.cells.values())
        }
        seeds = [
            {
                "runs": [self.runs[index].name for index in group.runs],
                "metrics": {
                    title: {"mean": _plain(mean), "standard_deviation": _plain(deviation), "runs": count}
                    for title, (mean, deviation, count) in group.means.items()
                },
            }
            for group in self.seeds
        ]
        return {"runs": made, "best": best, "seeds": seeds, "versions": differing_versions(self.runs)}


def _plain(value: Scalar) -> Scalar:
    """None for a number that JSON cannot write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
