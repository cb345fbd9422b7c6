"""Entries of our own and of BLIP's files: JSON lists, JSONL, CSV and TSV, or a folder whose pictures have texts beside them.

Captions: {"image": path below the image folder, "caption": text or list of texts, "image_id", "domain": optional}.
Questions: {"image", "question", "answer": text or list of texts, "question_id", "question_type", "answer_type": optional};
without "answer" in any entry nobody knows the answers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.annotations import Entry, digits, inside, read_entries
from blip2x.data.picture_inputs import is_picture_name
from blip2x.data.rows import CaptionRow, QuestionRow
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS

# The keys of test splits, whose captions and answers nobody knows; with any other one, something is misspelt.
_UNCAPTIONED = {"image", "image_id", "img_id", "domain"}
_UNANSWERED = {"image", "question", "question_id", "image_id", "question_type", "answer_type", "dataset"}


@ANNOTATION_FORMATS.register("entries")
class Entries:
    """Image numbers are ``image_id`` (or NoCaps's ``img_id``), or the number at its end, as in "coco_522418"."""

    def __init__(self, files: AnnotationFiles, images: Path):
        self._captions, self._questions, self._images = files.captions, files.questions, images

    def files(self) -> list[Path]:
        """The annotation files, or the folder with all folders and text files below it."""
        found = [path for path in (self._captions, self._questions) if path]
        return [Path(inner) for path in found for inner in (_below(path) if os.path.isdir(path) else [path])]

    def captions(self) -> Iterator[CaptionRow]:
        """One row per entry, or per picture with a text file."""
        path = Path(self._captions)
        if path.is_dir():
            yield from _pictures_with_texts(path, self._images)
            return
        for entry in read_entries(path):
            bare = "caption" not in entry.values and len(entry.values) > 1 and entry.values.keys() <= _UNCAPTIONED
            texts = () if bare else entry.texts("caption")
            yield CaptionRow(entry.where, entry.image, texts, _number(entry), entry.label("domain", ""))

    def questions(self) -> Iterator[QuestionRow]:
        """One row per entry."""
        for entry in read_entries(self._questions):
            question = entry.text("question")
            bare = "answer" not in entry.values and entry.values.keys() <= _UNANSWERED
            yield QuestionRow(
                where=entry.where,
                image=entry.image,
                question=question,
                answers=() if bare else entry.texts("answer"),
                question_id=digits(entry.values.get("question_id"), f"{entry.where}: 'question_id'"),
                question_type=entry.label("question_type", question.lower().split()[0]),
                answer_type=entry.label("answer_type", "other"),
                number=_number(entry),
            )


def _number(entry: Entry) -> int | None:
    values = entry.values
    return trailing_number(str(values.get("image_id", values.get("img_id", os.path.splitext(entry.image)[0]))))


def trailing_number(text: str) -> int | None:
    """The number that a text ends with, of its last twelve digits."""
    match = re.search(r"\d{1,12}$", text)
    return int(match.group()) if match else None


def _below(folder: str) -> Iterator[str]:
    """The folder, those below it, where a picture with a text may be added, and the texts in them."""
    for here, folders, files in os.walk(folder):
        folders.sort()
        yield here
        yield from (os.path.join(here, name) for name in sorted(files) if name.endswith(".txt"))


def _pictures_with_texts(folder: Path, images: Path) -> Iterator[CaptionRow]:
    """Each picture below `folder` that has a text file of its name beside it, whose lines are its captions."""
    start = os.path.relpath(folder, images)
    empty = True
    for here, folders, files in os.walk(folder):
        folders.sort()
        texts = {name for name in files if name.endswith(".txt")}
        for name in sorted(filter(is_picture_name, files)):
            stem = os.path.splitext(name)[0]
            if f"{stem}.txt" not in texts:
                continue
            where = os.path.join(here, f"{stem}.txt")
            try:
                lines = [line.strip() for line in Path(where).read_text(encoding="utf-8-sig").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{where} cannot be read: {error}") from error
            captions = tuple(filter(None, lines))
            if not captions:
                raise UserError(f"{where} has no caption; write one per line, or remove the file")
            empty = False
            image = inside(os.path.join(start, os.path.relpath(os.path.join(here, name), folder)), where)
            yield CaptionRow(where, image, captions, trailing_number(stem))
    if empty:
        raise UserError(f"{folder} has no picture with a text file of the same name beside it, as cat.jpg and cat.txt")
