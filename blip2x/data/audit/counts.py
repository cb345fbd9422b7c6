"""Counting without keeping what is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

EXAMPLES = 5  # of a finding
_BARS = 20  # of a histogram
_SHOWN = 200  # characters of an example


@dataclass
class Finding:
    """How often something was found, and the first few examples of it."""

    count: int = 0
    examples: list[Any] = field(default_factory=list)

    def add(self, **example: Any) -> None:
        """Found once more."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append({key: visible(value) if isinstance(value, str) else value for key, value in example.items()})

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {"count": self.count, "examples": self.examples}


def key_of(data: bytes | str) -> int:
    """64 bits that stand for a text or a file; that any two of ten million different ones meet has a chance of 1 to 370,000."""
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def spread(counter: Counter[int]) -> dict[str, Any]:
    """Smallest, median and largest of the numbers that `counter` counts, and [first, last, how many] of some ranges."""
    if not counter:
        return {"min": None, "median": None, "max": None, "bars": []}
    values = np.array(sorted(counter))
    counts = np.array([counter[value] for value in values.tolist()])
    median = values[np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2)]
    width = -(-(int(values[-1] - values[0]) + 1) // _BARS)
    bars = np.bincount((values - values[0]) // width, weights=counts).astype(int).tolist()
    starts = [int(values[0]) + index * width for index in range(len(bars))]
    ranges = [[start, start + width - 1, bar] for start, bar in zip(starts, bars, strict=True)]
    return {"min": int(values[0]), "median": int(median), "max": int(values[-1]), "bars": ranges}


def escaped(text: str) -> str:
    """The text with what cannot be seen, line breaks too, written as an escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def visible(text: str) -> str:
    """As `escaped`, at most 200 characters of it."""
    return escaped(text) if len(text) <= _SHOWN else f"{escaped(text[:_SHOWN])}..."
