"""Several image folders, each with annotation files as in `custom`, read one after the other as one data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blip2x.config.dataset import ImageTextPart, MixtureConfig
from blip2x.data.image_text import ImageTextFolder
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.source import Source, Split, documents, first_images
from blip2x.errors import UserError
from blip2x.registry import DATASETS

# Parts number their images independently; adding this many per part keeps the numbers apart and those of the first part
# as they are in its files. A part's own numbers have at most 12 digits.
_APART = 10**12


@DATASETS.register("mixture")
class Mixture(Source):
    """Folders are opened when a file of theirs is asked for, so that an evaluation needs no training images."""

    def __init__(self, cfg: MixtureConfig):
        if not cfg.parts:
            raise UserError("dataset.parts is empty; give at least one part with images and captions")
        self.cfg = cfg
        self.name = cfg.name
        self.skipped = []

    def captions(self, split: Split) -> list[CaptionSample]:
        """One sample per image, part after part."""
        samples: list[CaptionSample] = []
        for index, part in enumerate(self.cfg.parts):
            path = part.train_captions if split == "train" else part.eval_captions
            if path is not None:
                samples += _apart(self._folder(part).captions(path, clean=split == "train"), index)
        if not samples:
            raise self.lacks(f"captions for {split}", key=f"{split}_captions in dataset.parts")
        return samples if split == "train" else first_images(samples, self.cfg.eval_limit)

    def questions(self, split: Split) -> list[QuestionSample]:
        """The evaluation questions, part after part; numbered anew where parts use the same numbers."""
        if split == "train":
            raise self.lacks("questions for train")
        samples: list[QuestionSample] = []
        for index, part in enumerate(self.cfg.parts):
            if part.eval_questions is not None:
                samples += _apart(self._folder(part).questions(part.eval_questions), index)
        if not samples:
            raise self.lacks("questions for eval", key="eval_questions in dataset.parts")
        if len({sample.question_id for sample in samples}) < len(samples):
            samples = [replace(sample, question_id=number) for number, sample in enumerate(samples)]
        return first_images(samples, self.cfg.eval_limit)

    def texts(self) -> list[str]:
        """One document per training image: its captions, a line each."""
        return documents(self.captions("train"))

    def _folder(self, part: ImageTextPart) -> ImageTextFolder:
        return ImageTextFolder(Path(part.images), self.cfg.on_bad_image, self.cfg.max_pixels, skipped=self.skipped)


def _apart(samples: list, part: int) -> list:
    return [replace(sample, image_id=sample.image_id + part * _APART) for sample in samples] if part else samples
