"""Lines of metrics.jsonl and predictions.jsonl, as the sections sort them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def is_number(value: Any) -> bool:
    """Whether `value` is a measurement; it may be NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def numbers(rows: list[Row], key: str) -> list[float]:
    """The finite values of `key`, in order."""
    return [row[key] for row in rows if is_number(row.get(key)) and math.isfinite(row[key])]


def by(rows: list[Row], key: str) -> dict[str, list[Row]]:
    """Rows by the value of `key` ("run" where they have none), both in order of appearance."""
    return group(rows, lambda row: str(row.get(key, "run")))


def group(rows: list[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Rows by key, both in order of appearance."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def look_up(values: Any, *keys: str) -> Any:
    """What nested mappings hold under `keys`; None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values
