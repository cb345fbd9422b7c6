"""The table that ends a run in the terminal."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blip2x.engine.comparisons import BASELINES, Measure, read_measures


def results_table(results: dict[str, Any]) -> Table:
    """Metrics of `results` (the content of results.json), each with its interval and its baselines; types are in the report."""
    table = Table(title="Results", caption=_cost(results), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("stage", style="bold", no_wrap=True)
    table.add_column("metric")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("baseline", justify="right")
    table.add_column("against it", justify="right", no_wrap=True)
    overall = [measure for measure in read_measures(results) if not measure.part]
    for stage, group in groupby(overall, key=lambda measure: measure.stage):
        table.add_section()
        for index, measure in enumerate(group):
            # Text, not str: square brackets in a name are no markup
            value = Text(f"{measure.shown()} {measure.shown_interval()}".rstrip())
            table.add_row(Text("" if index else stage), Text(measure.key), value, *_baseline_cells(measure))
    return table


def _baseline_cells(measure: Measure) -> tuple[Text, Text]:
    values = [f"{measure.shown(baseline.value)} {BASELINES[baseline.kind]}" for baseline in measure.baselines]
    gains = [Text(measure.gain(baseline), style="bold" if measure.beats(baseline) else "") for baseline in measure.baselines]
    return Text("\n".join(values)), Text("\n").join(gains)


def _cost(results: dict[str, Any]) -> str | None:
    words = []
    if results.get("seconds") is not None:
        words.append(f"{results['seconds']:.0f} seconds" + (f" of start {results['starts']}" if "starts" in results else ""))
    if results.get("pruned") is not None:
        words.append(f"stopped at step {results['pruned']}")
    if results.get("peak_memory_gb") is not None:
        words.append(f"{results['peak_memory_gb']:.1f} GB peak memory")
    return ", ".join(words) or None
