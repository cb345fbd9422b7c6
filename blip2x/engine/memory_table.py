"""The table of what a training's memory consists of: in the terminal and as a page."""

from __future__ import annotations

from blip2x.models.memory.predict import Part, Prediction

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


def lines(found: Prediction, width: int | None = None) -> list[str]:
    """The same for a terminal of `width` columns, None: any: a table, or, where it is too narrow, a line per part."""
    table = [_COLUMNS, *rows(found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
    if width is None or sum(widths) + 2 * len(widths) <= width:
        return [
            "  ".join(cell.ljust(w) if c in (0, 3) else cell.rjust(w) for c, (cell, w) in cells).rstrip()
            for cells in (enumerate(zip(row, widths, strict=True)) for row in table)
        ]
    said = []
    for row in table[1:]:
        cells = [f"{column} {cell}" for column, cell in zip(_COLUMNS[1:], row[1:], strict=True) if cell not in ("", "0")]
        said.append(f"{row[0]}: {', '.join(cells)}")
    return said
