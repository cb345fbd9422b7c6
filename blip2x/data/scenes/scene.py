"""Scenes as facts: which digit, in which colour, in which cell; and how they are drawn by lot."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blip2x.data.scenes.handwriting import DIGITS

Combination = tuple[int, str]  # digit, colour


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a cell; `source` is the index of its handwritten image."""

    digit: int
    colour: str
    row: int  # 0 is the top
    column: int  # 0 is the left
    source: int


@dataclass(frozen=True)
class Scene:
    """Digits of distinct values, colours and cells, so that each can be named without doubt."""

    digits: tuple[PlacedDigit, ...]

    @property
    def combinations(self) -> frozenset[Combination]:
        """The digit-colour pairs."""
        return frozenset((placed.digit, placed.colour) for placed in self.digits)


def relations(a: PlacedDigit, b: PlacedDigit) -> dict[str, int]:
    """How `a` lies to `b`, e.g. {"left of": 2, "above": 1}, with the distance in cells; one of each axis at most."""
    found = {}
    if a.column != b.column:
        found["left of" if a.column < b.column else "right of"] = abs(a.column - b.column)
    if a.row != b.row:
        found["above" if a.row < b.row else "below"] = abs(a.row - b.row)
    return found


def held_out_combinations(colours: Sequence[str], *, count: int, seed: int) -> frozenset[Combination]:
    """`count` digit-colour pairs, spread evenly; each digit and each colour keeps at least one pair.

    Needs count <= 10 * (colours - 1) and at most ten colours.
    """
    rng = random.Random(f"{seed}/held-out")
    digits, order = rng.sample(DIGITS, len(DIGITS)), rng.sample(list(colours), len(colours))
    return frozenset((digits[i % 10], order[(i // 10 + i % 10) % len(order)]) for i in range(count))


class SceneLottery:
    """Draws scenes of 1 to `max_digits` digits; `sources` maps a digit to the images it may be shown by."""

    def __init__(self, *, sources: Mapping[int, Sequence[int]], colours: Sequence[str], grid: int, max_digits: int, seed: str):
        self.sources = sources
        self.colours = list(colours)
        self.cells = [(row, column) for row in range(grid) for column in range(grid)]
        self.max_digits = max_digits
        self.rng = random.Random(seed)

    def draw(self) -> Scene:
        """A scene; each number of digits is equally likely."""
        rng, count = self.rng, self.rng.randint(1, self.max_digits)
        chosen = zip(rng.sample(DIGITS, count), rng.sample(self.colours, count), rng.sample(self.cells, count), strict=True)
        return Scene(
            tuple(PlacedDigit(digit, colour, *cell, source=rng.choice(self.sources[digit])) for digit, colour, cell in chosen)
        )

    def draw_where(self, held_out: frozenset[Combination], *, wanted: bool) -> Scene:
        """A scene with at least one of the `held_out` combinations where `wanted`, with none of them otherwise."""
        while True:
            scene = self.draw()
            if bool(scene.combinations & held_out) == wanted:
                return scene
