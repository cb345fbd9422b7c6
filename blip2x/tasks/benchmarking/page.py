"""The benchmark's figures as a page of Markdown: benchmark.md of the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from blip2x.tasks.benchmarking.curves import Curve
from blip2x.tasks.benchmarking.measure import Measured
from blip2x.tasks.benchmarking.tables import curves_table, operations, parts_table, rates_table, title


def page(record: dict[str, Any], results: Sequence[Measured], curves: Sequence[Curve], plot: str) -> str:
    """The tables of the terminal, below what they were measured on.

    Args:
        record: what benchmark.json has: machine, versions, command, ranks, precision, peak.
        results: of the tasks.
        curves: of cost against size; may be empty.
        plot: where the page finds the picture of the curves.
    """
    known = record["versions"]
    named = ", ".join(f"{name} {known[name]}" for name in ("blip2x", "paddlepaddle", "paddlenlp", "python") if known.get(name))
    changed = " with changes that are not committed" if known.get("git_dirty") else ""
    shared = f", parallelism {record['parallelism']}" if record["ranks"] > 1 else ""
    lines = [
        "# What it costs",
        f"    {record['command']}",
        f"{_machine(record['hardware'])}. Ranks: {record['ranks']}{shared}; threads of each: {record['hardware']['threads']}; "
        f"{record['device']}, {record['precision']}. {named}; commit {str(known.get('git_commit'))[:10]}{changed}.",
        f"Matrix peak of a rank: {operations(record['matrix_peak'])} per second.",
    ]
    for found in results:
        lines += [f"## {title(found)}", markdown(parts_table(found))]
    lines += ["## Rates", markdown(rates_table(results))]
    if curves:
        lines += ["## Cost against size", markdown(curves_table(curves)), f"![Seconds against size]({plot})"]
    return "\n\n".join(lines) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    gpus = f", {len(machine['gpus'])} x {machine['gpus'][0]}" if machine.get("gpus") else ""
    return f"{machine['cpu']}, {machine['usable_cores']} cores{gpus}, {machine['memory_gb']} GB, {machine['system']}"


def markdown(table: Table) -> str:
    """A table of the terminal; its title and its lines between sections are left out."""
    columns = [
        [str(column.header), "---:" if column.justify == "right" else "---", *(_cell(cell) for cell in column.cells)]
        for column in table.columns
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in zip(*columns, strict=True))


def _cell(cell: Any) -> str:
    return f"**{cell.plain}**" if isinstance(cell, Text) else str(cell)
