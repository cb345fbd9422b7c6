"""GQA's official files: {question id: {"question", "answer", "imageId", "types": {"structural", "semantic"}}}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.annotations import inside, read_mapping
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
            yield QuestionRow(
                where=entry.where,
                image=inside(self._template.format(image), entry.where),
                question=entry.text("question"),
                answers=entry.texts("answer") if "answer" in entry.values else (),
                question_id=int(key) if key.isdecimal() else None,
                question_type=str(types.get("structural", "other")),
                answer_type=str(types.get("semantic", "other")),
                number=trailing_number(image),
            )
