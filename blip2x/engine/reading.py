"""Files of a run folder, read for others to look at: what is absent is empty, what is broken is a note, neither is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FLOAT_DIGITS = 308  # an integer of more digits may be larger than any float


def read_json(path: Path, notes: list[str] | None = None, name: str = "") -> dict[str, Any]:
    """The object in a JSON file; `notes`, if given, says by `name` (default: the file's) why there is none."""
    name, notes = name or path.name, [] if notes is None else notes
    try:
        value = _parse(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        notes.append(f"{name} is not what a run writes, and was left out")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RecursionError):
        notes.append(f"{name} cannot be read and was left out")
    return {}


def read_lines(path: Path, notes: list[str], name: str = "") -> Iterator[dict[str, Any]]:
    """The objects in a file of one JSON per line; others than objects are left out, and `notes` says what is broken."""
    name = name or path.name
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        notes.append(f"{name} cannot be read and was left out")
        return
    broken = 0
    for line in text.split("\n"):  # splitlines() would also cut at separators inside a text
        try:
            row = _parse(line) if line.strip() else None
        except (ValueError, RecursionError):
            broken += 1
            continue
        if isinstance(row, dict):
            yield row
    if broken:
        notes.append(f"{name}: {broken} line{'s' if broken > 1 else ''} could not be read and were left out")


def _parse(text: str) -> Any:
    return json.loads(text, parse_int=_integer)


def _integer(text: str) -> int | float:
    """As a float, which then is infinite, where arithmetic with it could overflow."""
    return int(text) if len(text) <= _FLOAT_DIGITS else float(text)
