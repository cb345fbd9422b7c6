"""GQA's official files: {question id: {"question", "answer", "imageId", "types": {"structural", "semantic"}}}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.annotations import digits, image_path, read_mapping, sound
from blip2x.data.formats.entries import trailing_number
from blip2x.data.rows import CaptionRow, QuestionRow
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS


@ANNOTATION_FORMATS.register("gqa")
class Gqa:
    """One answer per question; its structure (query, verify, ...) is its type, what it is about (object, ...) the answer's."""

    def __init__(self, files: AnnotationFiles, images: Path):
        self._path, self._template = files.questions, files.image or "{}.jpg"

    def files(self) -> list[Path]:
        """The one file."""
        return [Path(self._path)]

    def captions(self) -> Iterator[CaptionRow]:
        """There are none in such files."""
        raise UserError("format: gqa has no captions; the format of a file of captions must be coco or entries")

    def questions(self) -> Iterator[QuestionRow]:
        """One row per question."""
        for key, entry in read_mapping(self._path):
            image = entry.text("imageId")
            types = entry.values.get("types") or {}
            if not isinstance(types, dict):
                raise UserError(f"{entry.where}: 'types' must be an object with 'structural' and 'semantic', got {types!r:.60}")
            kinds = (sound(str(types.get(key, "other"))) for key in ("structural", "semantic"))
            yield QuestionRow(
                where=entry.where,
                image=image_path(self._template, entry.where, image),
                question=entry.text("question"),
                answers=entry.texts("answer") if "answer" in entry.values else (),
                question_id=digits(key, f"{entry.where}: the key"),
                question_type=next(kinds),
                answer_type=next(kinds),
                number=trailing_number(image),
            )
