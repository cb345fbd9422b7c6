"""Tables of names: each row says how a family's files call one of our layers, and how its matrix is laid out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import numpy as np

from blip2x.models.weights.stored import StoredTensor


class Change(Enum):
    """What is done to a tensor between a file's layout and ours."""

    none = "as it is"
    transpose = "transposed"  # a linear layer's weight is [out, in] in PyTorch and [in, out] in Paddle
    leading = "leading axes of 1 added"
    scalar = "one axis added"

    def to_ours(self, tensor: StoredTensor, axes: int = 3) -> StoredTensor:
        """The tensor in our layout."""
        if self is Change.none:
            return tensor
        if self is Change.transpose:
            return tensor.changed(tensor.shape[::-1], np.transpose)
        shape = (1,) * ((1 if self is Change.scalar else axes) - len(tensor.shape)) + tensor.shape
        return tensor.changed(shape, lambda array: array.reshape(shape))


class Row(NamedTuple):
    """`theirs` and `ours` are names of a layer; ``{i}`` stands for a number, the same in both.

    `parts`: which tensors the layer has and what is done to each. An empty part is the name itself.
    """

    theirs: str
    ours: str
    parts: tuple[tuple[str, Change], ...]


LINEAR = (("weight", Change.transpose), ("bias", Change.none))
MATRIX = (("weight", Change.transpose),)
PLAIN = (("weight", Change.none), ("bias", Change.none))  # norms and convolutions
EMBEDDING = (("weight", Change.none),)
TENSOR = (("", Change.none),)
LEADING = (("", Change.leading),)
SCALAR = (("", Change.scalar),)


class Tied(NamedTuple):
    """A tensor that our models share with another one, so that a file's copy of it is left out.

    `must_equal`: whether the copy's numbers have to be the same; else a difference is said.
    """

    theirs: str
    ours: str
    change: Change
    must_equal: bool


@dataclass(frozen=True)
class Table:
    """All rows of a family of files.

    Attributes:
        rows: two of them may make the same tensor of ours (opt_proj and t5_proj); a file that has both is refused.
        dropped: patterns of names that have no place in our models, and why they are left out.
        tied: what a file may hold a second time.
    """

    rows: tuple[Row, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    tied: tuple[Tied, ...] = ()

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str, str, Change]]:
        found = []
        for row in self.rows:
            for part, change in row.parts:
                theirs, ours = _join(row.theirs, part), _join(row.ours, part)
                found.append((_pattern(theirs), theirs, ours, change))
        return found

    def to_ours(self, name: str) -> list[tuple[str, Change]]:
        """Our names for a tensor of the file; several where ours start as copies of one, none where it is unknown."""
        found = []
        for pattern, _, ours, change in self._patterns:
            if match := pattern.fullmatch(name):
                found.append((ours.replace("{i}", match["i"]) if "{i}" in ours else ours, change))
        return found

    @cached_property
    def _inverse(self) -> list[tuple[re.Pattern, str, Change]]:
        return [(_pattern(ours), theirs, change) for _, theirs, ours, change in self._patterns]

    def to_theirs(self, name: str) -> tuple[str, Change] | None:
        """The file's name for a tensor of ours, and what was done to it; None: the file has no place for it."""
        for pattern, theirs, change in self._inverse:
            if match := pattern.fullmatch(name):
                return (theirs.replace("{i}", match["i"]) if "{i}" in theirs else theirs), change
        return None

    def reason(self, name: str) -> str | None:
        """Why a tensor of the file is left out; None: there is no reason."""
        return next((why for pattern, why in self.dropped if re.fullmatch(pattern, name)), None)


def prefixed(rows: Iterable[Row], theirs: str = "", ours: str = "") -> tuple[Row, ...]:
    """The rows with something before their names."""
    return tuple(Row(theirs + row.theirs, ours + row.ours, row.parts) for row in rows)


def in_out(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of a family whose linear layers are laid out as ours."""
    plain = {Change.transpose: Change.none}
    return tuple(Row(row.theirs, row.ours, tuple((part, plain.get(how, how)) for part, how in row.parts)) for row in rows)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{i\}", r"(?P<i>\d+)"))
