"""Image folders with annotation files: one, or several parts that training mixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from blip2x.config.dataset import AnnotationFiles, ImageTextConfig, ImageTextPart
from blip2x.data.image_text import ImageTextFolder
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.source import Source, Split, documents, first_images
from blip2x.errors import UserError
from blip2x.registry import DATASETS

# Parts number their images independently; adding this many per part keeps the numbers apart and those of the first part
# as they are in its files. A part's own numbers have at most 12 digits.
_APART = 10**12


@DATASETS.register("image_text")
class ImageText(Source):
    """Folders are opened when a file of theirs is asked for, so that an evaluation needs no training images."""

    def __init__(self, cfg: ImageTextConfig):
        if not cfg.parts:
            raise UserError("dataset.parts is empty; give at least one part with images and captions")
        self.cfg = cfg
        self.name = cfg.name
        self.skipped = []

    def captions(self, split: Split) -> list[CaptionSample]:
        """One sample per image, part after part; those to train on are cleaned as BLIP does, the others stay as they are."""
        samples: list[CaptionSample] = []
        for index, part, files in self._parts(split, "captions"):
            samples += _apart(self._folder(part).captions(files.captions, clean=split == "train"), index)
        return samples if split == "train" else first_images(samples, self.cfg.eval_limit)

    def questions(self, split: Split) -> list[QuestionSample]:
        """The questions, part after part; numbered anew where parts use the same numbers."""
        samples: list[QuestionSample] = []
        for index, part, files in self._parts(split, "questions"):
            samples += _apart(self._folder(part).questions(files.questions), index)
        if len({sample.question_id for sample in samples}) < len(samples):
            samples = [replace(sample, question_id=number) for number, sample in enumerate(samples)]
        return samples if split == "train" else first_images(samples, self.cfg.eval_limit)

    def texts(self) -> list[str]:
        """One document per training image: its captions, a line each."""
        return documents(self.captions("train"))

    def _parts(self, split: Split, sort: Literal["captions", "questions"]) -> list[tuple[int, ImageTextPart, AnnotationFiles]]:
        """The parts, with their places, that have annotations of `sort` for `split`, and their files."""
        name = getattr(self.cfg, f"{split}_split") or self.cfg.eval_split
        parts = list(self.cfg.parts.values())
        known = list(dict.fromkeys(split for part in parts for split in part.splits))
        if name not in known:
            raise UserError(f"dataset.{split}_split={name}: data set {self.name!r} has the splits {', '.join(known)}")
        found = [(index, part, part.splits[name]) for index, part in enumerate(parts) if name in part.splits]
        found = [(index, part, files) for index, part, files in found if getattr(files, sort) is not None]
        if not found:
            raise self.lacks(f"{sort} for {split}", key=self._key(split, name, sort))
        return found

    def _key(self, split: Split, name: str, sort: str) -> str:
        """The config key that would give the annotations `sort` of a split, which the data set calls `name`."""
        return f"{sort} of the split {name!r} in dataset.parts"

    def _folder(self, part: ImageTextPart) -> ImageTextFolder:
        return ImageTextFolder(Path(part.images), self.cfg.on_bad_image, self.cfg.max_pixels, skipped=self.skipped)


def _apart(samples: list, part: int) -> list:
    return [replace(sample, image_id=sample.image_id + part * _APART) for sample in samples] if part else samples
