"""The table of what a training's memory consists of: in the terminal and as a page."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from blip2x.models.memory.predict import Part, Prediction

_TABLE_WIDTH = 120  # columns of a terminal; a narrower one gets lines
_COLUMNS = ("part", "parameters", "trained", "stored as", "weights", "gradients", "optimizer", "activations", "in all")


def amount(size: float) -> str:
    """Bytes for readers."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if size else "0"


def rows(found: Prediction) -> list[tuple[str, ...]]:
    """The table's lines, its sum last."""
    sums = Part(
        "in all",
        *(sum(getattr(part, name) for part in found.parts) for name in ("parameters", "trained")),
        (),
        *(sum(getattr(part, name) for part in found.parts) for name in ("weights", "gradients", "optimizer")),
        found.activations,
    )
    batch = Part("batch", 0, 0, ("float32",), 0, 0, 0, found.batch)
    return [_row(part) for part in (*found.parts, batch, sums)]


def _row(part: Part) -> tuple[str, ...]:
    sizes = (part.weights, part.gradients, part.optimizer, part.activations, part.total)
    return (part.name, f"{part.parameters:,}", f"{part.trained:,}", " and ".join(part.types), *map(amount, sizes))


def markdown(name: str, found: Prediction, said: list[str]) -> str:
    """The same as a page."""
    lines = [f"## {name}", "", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows(found)]
    return "\n".join([*lines, "", *said, ""])


def show(console: Console, title: str, found: Prediction, said: list[str]) -> None:
    """Print the table, as lines where the terminal is narrow, and under it the sentences `said`."""
    if console.is_terminal and console.width >= _TABLE_WIDTH:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if index in (0, 3) else "right", no_wrap=True)
        *body, last = rows(found)
        for row in body:
            table.add_row(*row)
        table.add_section()
        table.add_row(*last, style="bold")
        console.print(table)
    else:
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        for row in rows(found):
            cells = [f"{column} {cell}" for column, cell in zip(_COLUMNS[1:], row[1:], strict=True) if cell not in ("", "0")]
            console.print(f"  {row[0]}: {', '.join(cells)}", markup=False, highlight=False, soft_wrap=True)
    for sentence in said:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
