"""Rows of predictions.jsonl as a table with pictures, the same for every logger."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from blip2x.engine.loggers import Row

LONGER_SIDE = 320  # pixels of a picture in a table

_PICTURES = ("image", "attention")
_FIRST = (  # the order of columns; others come behind
    *_PICTURES, "name", "source", "question", "prompt", "text", "caption", "prediction", "texts", "retrieved_texts",
    "retrieved_images", "found", "references", "answers", "correct", "rank", "score", "scores",
)  # fmt: skip
_LEFT_OUT = ("stage", "image_id", "question_id")
_TEXT = 2000  # characters of a cell
_SHOWN = 3  # of what was found for a query


@dataclass(frozen=True)
class Table:
    """Cells are pictures, texts, numbers or None."""

    columns: list[str]
    rows: list[list[Any]]


def make_table(rows: Sequence[Row], folder: Path, most: int, clean: Callable[[str], str]) -> Table:
    """At most `most` of `rows`, those with a picture before others and evenly chosen; pictures are read from `folder`.

    Args:
        rows: of one kind.
        folder: what pictures' paths are relative to.
        most: rows.
        clean: what becomes of texts.
    """
    pictured = [row for row in rows if any(picture is not None for picture in _pictures(row))]
    chosen = _evenly(pictured or rows, most)
    cells = [{name: cell for key, value in row.items() for name, cell in _cells(key, value, folder, clean)} for row in chosen]
    found = dict.fromkeys(name for row in cells for name, cell in row.items() if cell is not None)
    order = {name: place for place, name in enumerate(_FIRST)}
    columns = sorted(found, key=lambda name: order.get(name.split("/")[0], len(order)))
    return Table(columns, [[row.get(name) for name in columns] for row in cells])


def _pictures(row: Row) -> list[Any]:
    """The row's own, and those of the images that a text has found."""
    return [row.get(key) for key in _PICTURES] + [entry["image"] for entry in row.get("retrieved_images", ())[:_SHOWN]]


def _evenly(rows: Sequence[Row], most: int) -> list[Row]:
    return [rows[place * len(rows) // most] for place in range(most)] if len(rows) > most else list(rows)


def _cells(key: str, value: Any, folder: Path, clean: Callable[[str], str]) -> list[tuple[str, Any]]:
    if key in _LEFT_OUT:
        return []
    if key in _PICTURES:
        return [(key, _picture(value, folder))]
    if isinstance(value, dict):  # the scores of a caption by metric
        return [(f"{key}/{name}", inner) for name, inner in value.items()]
    if key.startswith("retrieved"):
        found = value[:_SHOWN]
        pictures = [(f"found/{n}", _picture(entry["image"], folder)) for n, entry in enumerate(found, 1) if "image" in entry]
        return [(key, clean(" | ".join(map(_found, found)))[:_TEXT]), *pictures]
    if isinstance(value, (list, tuple)):
        return [(key, clean(" | ".join(map(_said, value)))[:_TEXT])]
    return [(key, clean(value)[:_TEXT] if isinstance(value, str) else value)]


def _found(entry: dict[str, Any]) -> str:
    """A candidate of a search, with a tick where it is a right one."""
    return f"{entry.get('text', entry.get('name'))}{' ✓' if entry.get('right') else ''}"


def _said(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _picture(value: Any, folder: Path) -> Image.Image | None:
    """A small copy; None where the run has kept no picture, or it cannot be read."""
    if value is None:
        return None
    try:
        picture = (value if isinstance(value, Image.Image) else Image.open(folder / value)).convert("RGB")
        picture.thumbnail((LONGER_SIDE, LONGER_SIDE))
        return picture
    except Exception:  # decoders meet garbage with all sorts of exceptions; the row's texts are still worth showing
        return None
