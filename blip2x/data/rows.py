"""What is read of annotation files, before it becomes a table: one module of `formats` per kind of file makes these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class CaptionRow:
    """Captions of an image; several rows may be of the same one. An image without any has no true caption."""

    where: str  # for messages
    image: str  # below the image folder
    captions: tuple[str, ...]
    number: int | None = None  # the image's, in the file
    group: str = ""
    stored: tuple[str, int, int] | None = None  # of an image inside a file: that file, offset and length in bytes


@dataclass(frozen=True)
class QuestionRow:
    """A question; without answers where none are known."""

    where: str
    image: str
    question: str
    answers: tuple[str, ...]
    question_id: int | None
    question_type: str
    answer_type: str
    number: int | None = None
    group: str = ""


class Format(Protocol):
    """Reads the annotation files of a split."""

    def files(self) -> list[Path]:
        """All that it reads: when one of them changes, everything is read again."""

    def captions(self) -> Iterator[CaptionRow]:
        """In the order of the file; raises `UserError` where that is impossible."""

    def questions(self) -> Iterator[QuestionRow]:
        """In the order of the file; raises `UserError` where that is impossible."""
