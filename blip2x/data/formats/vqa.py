"""The official files of VQAv2 and OK-VQA: questions, and in another file their answers by ten annotators.

{"questions": [{"question_id", "image_id", "question"}]} and {"annotations": [{"question_id", "question_type", "answer_type",
"answers": [{"answer"}]}]}.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.annotations import Entry, image_path, read_lists, sound
from blip2x.data.rows import CaptionRow, QuestionRow
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS


class _Answered(NamedTuple):
    answers: tuple[str, ...]
    question_type: str
    answer_type: str


@ANNOTATION_FORMATS.register("vqa")
class Vqa:
    """An image's path is ``image`` of the config, filled in with its number; without answers nobody knows them."""

    def __init__(self, files: AnnotationFiles, images: Path):
        self._questions, self._answers, self._template = files.questions, files.answers, files.image

    def files(self) -> list[Path]:
        """Both files."""
        return [Path(path) for path in (self._questions, self._answers) if path]

    def captions(self) -> Iterator[CaptionRow]:
        """There are none in such files."""
        raise UserError("format: vqa has no captions; the format of a file of captions must be coco or entries")

    def questions(self) -> Iterator[QuestionRow]:
        """One row per question, in the order of the questions' file."""
        if not self._template:
            raise UserError(f"{self._questions} gives numbers of images only; set image of this split, e.g. {{:012d}}.jpg")
        answered = dict(map(_answered, *read_lists(self._answers, "annotations"))) if self._answers else None
        (questions,) = read_lists(self._questions, "questions")
        for entry in questions:
            question_id, number, question = entry.number("question_id"), entry.number("image_id"), entry.text("question")
            if answered is None:
                found = _Answered((), question.lower().split()[0], "other")
            elif question_id in answered:
                found = answered[question_id]
            else:
                raise UserError(f"{self._answers} has no answers to question {question_id} of {self._questions}")
            image = image_path(self._template, entry.where, number)
            yield QuestionRow(entry.where, image, question, found.answers, question_id, found[1], found[2], number)


def _answered(entry: Entry) -> tuple[int, _Answered]:
    try:
        answers = tuple(sys.intern(sound(given["answer"]).strip()) for given in entry.get("answers"))  # few differ, of millions
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'{entry.where}: \'answers\' must be a list of objects like {{"answer": "yes"}}') from error
    kinds = (sys.intern(entry.label(key, "other")) for key in ("question_type", "answer_type"))
    return entry.number("question_id"), _Answered(answers, *kinds)
