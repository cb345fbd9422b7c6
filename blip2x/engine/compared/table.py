"""The comparison in the terminal: the columns that fit, those first that say most."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from blip2x.engine.compared.differences import Key, shortened
from blip2x.engine.compared.metrics import HIGHER, Column
from blip2x.engine.compared.runs import ComparedRun
from blip2x.engine.comparisons import TIMES

MOST_ROWS = 40
CLOSE = "\u2248"  # within the interval of the best
_WIDE = 120  # columns of the terminal, at most
_NAME, _VALUE = 30, 18  # characters of a run's name and of a key's value
_SPACE, _EDGES = 3, 2  # characters around a column and around the table

_Printed = tuple[str, list[Text], bool]  # heading, cells, whether they are numbers


def comparison_table(
    runs: Sequence[ComparedRun],
    keys: Sequence[Key],
    found: Sequence[Column],
    order: Sequence[int],
    first: Column | None,
    width: int,
) -> Group:
    """Runs in `order` with their headline figures, `first` before all, no wider than `width` or 120 characters."""
    rows = list(order[:MOST_ROWS])
    names = [Text(shortened(runs[index].name, _NAME), no_wrap=True) for index in rows]
    about: list[_Printed] = []
    if any(not run.complete for run in runs):
        about.append(("state", [Text(runs[index].state.partition(",")[0]) for index in rows], False))
    for key in keys:
        if key.lead is None:
            texts = [Text(shortened(key.texts[index], _VALUE)) for index in rows]
            about.append((key.title, texts, key.numbers is not None))
    headlines = [column for column in found if column.headline]
    figures = [(_heading(column), [_figure(column, index) for index in rows], True) for column in headlines]
    by_weight = sorted(range(len(figures)), key=lambda place: _weight(headlines[place], place, first))
    room = min(width, _WIDE) - _EDGES - _width(("run", names, False))
    # however many keys differ, two figures have their place; what is in it after that goes by weight
    kept = sum(_width(figures[place]) for place in by_weight[:2])
    shown = []
    for column in about:
        if _width(column) + kept <= room:
            shown.append(column)
            room -= _width(column)
    chosen = set()
    for place in by_weight:
        if _width(figures[place]) <= room:
            chosen.add(place)
            room -= _width(figures[place])
    left = len(about) - len(shown) + len(figures) - len(chosen)
    shown += [figures[place] for place in sorted(chosen)]
    table = Table(title="Comparison", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("run", no_wrap=True)
    for heading, _, is_number in shown:
        table.add_column(Text(heading), justify="right" if is_number else "left", no_wrap=True)
    for place, name in enumerate(names):
        table.add_row(name, *(cells[place] for _, cells, _ in shown))
    close = any(CLOSE in cell.plain for _, cells, _ in shown for cell in cells)
    said = [f"{CLOSE} its interval overlaps the best's"] if close else []
    said += [f"{TIMES} the best"] if any(TIMES in cell.plain for _, cells, _ in shown for cell in cells) else []
    said += ["( ) not final"] if any(cell.plain.startswith("(") for _, cells, _ in shown for cell in cells) else []
    said += [f"{left} more column{'s' if left > 1 else ''}"] if left else []
    said += [f"{len(order) - len(rows)} more runs"] if len(order) > len(rows) else []
    return (
        Group(table, Text("; ".join(said), style="dim")) if said else Group(table)
    )  # a caption would wrap below a narrow table


def _weight(column: Column, place: int, first: Column | None) -> tuple[bool, bool, bool, int]:
    """Least for what must not be missing: the metric that runs are ordered by, then scores that differ, late stages' first."""
    return column is not first, len(column.cells) > 1 and not column.differs, column.better != HIGHER, -place


def _width(column: _Printed) -> int:
    heading, cells, _ = column
    return _SPACE + max([*map(len, heading.split("\n")), *(cell.cell_len for cell in cells)])


def _heading(column: Column) -> str:
    label = column.label.replace(", recall", "\nrecall").replace("peak memory, ", "")
    return f"{column.group}\n{label}" if column.group else label


def _figure(column: Column, index: int) -> Text:
    cell = column.cells.get(index)
    if cell is None:
        return Text("")
    if not cell.final:
        return Text(f"({cell.measure.shown()})", style="dim")
    times = "" if cell.times is None else f" {cell.times:.2f}{TIMES}"
    return Text(f"{cell.measure.shown()}{f' {CLOSE}' if cell.close else ''}{times}", style="bold" if cell.best else "")
