"""docs/config.md says what the dataclasses say, of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Dict, List, Optional

import pytest

from blip2x.config.reference import keys_of, reference

PAGE = Path(__file__).resolve().parents[2] / "docs/config.md"


class Mood(Enum):
    good = "good"
    bad = "bad"


@dataclass
class Inner:
    depth: int = 1  # of the sea


@dataclass
class Base:
    kind: str = "a"
    size: Optional[float] = None  # metres | feet


@dataclass
class Made(Base):
    mood: Mood = Mood.good  # of the captain
    # above the line,
    # on two lines
    names: List[str] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    many: Dict[str, Inner] = field(default_factory=dict)


@pytest.fixture(scope="module")
def page() -> str:
    return reference()


def test_the_page_is_up_to_date(page):
    assert PAGE.read_text(encoding="utf-8") == page, "run: python -m blip2x.config.reference > docs/config.md"


def test_every_key_has_a_meaning(page):
    assert [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")] == []


def test_keys_of_a_dataclass_and_of_those_inside_it():
    assert [(key.name, key.type, key.meaning) for key in keys_of(Made)] == [
        ("size", "number or null", "metres \\| feet"),
        ("mood", "good \\| bad", "of the captain"),
        ("names", "list of text", "above the line, on two lines"),
        ("inner.depth", "integer", "of the sea"),
        ("many.<name>.depth", "integer", "of the sea"),
    ]
