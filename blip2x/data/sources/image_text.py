"""Image folders with annotation files: one, or several parts that training mixes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from blip2x.config.dataset import AnnotationFiles, ImageTextConfig, ImageTextPart
from blip2x.data.image_text import ImageTextFolder
from blip2x.data.samples import CaptionSample, QuestionSample, has_truth
from blip2x.data.sequences import Documents, Mixture, Samples
from blip2x.data.source import Source, Split
from blip2x.errors import UserError
from blip2x.registry import DATASETS

_APART = 10**12  # between the parts' image numbers, which have at most 12 digits


@DATASETS.register("image_text")
class ImageText(Source):
    """Folders are opened when a file of theirs is asked for, so that an evaluation needs no training images."""

    def __init__(self, cfg: ImageTextConfig):
        if not cfg.parts:
            raise UserError("dataset.parts is empty; give at least one part with images and captions")
        self.cfg = cfg
        self.name = cfg.name
        self.skipped = []

    @property
    def val_is_eval(self) -> bool:
        """Whether both splits have the same files."""
        val, evaluated = self.cfg.val_split or self.cfg.eval_split, self.cfg.eval_split
        return all(part.splits.get(val) == part.splits.get(evaluated) for part in self.cfg.parts.values())

    def captions(self, split: Split) -> Samples[CaptionSample]:
        """One sample per image, part after part; those to train on are cleaned as BLIP does, the others stay as they are."""
        clean = split == "train"
        return self._join(split, "captions", lambda part, files: self._folder(part).captions(files, clean=clean))

    def questions(self, split: Split) -> Samples[QuestionSample]:
        """The questions, part after part; numbered anew where parts use the same numbers."""
        return self._join(split, "questions", lambda part, files: self._folder(part).questions(files))

    def texts(self) -> Documents:
        """One document per training image: its captions, a line each."""
        return Documents(self.captions("train"))

    def _join(
        self,
        split: Split,
        sort: Literal["captions", "questions"],
        read: Callable[[ImageTextPart, AnnotationFiles], Samples],
    ) -> Samples:
        parts = self._parts(split, sort)
        samples = [read(part, files) for part, files in parts]
        # captions to train on are known of every part, and the first ones may be unusable
        if (split != "train" or sort == "questions") and len({has_truth(part) for part in samples}) > 1:
            raise UserError(f"data set {self.name!r}: the true answers of some parts are known for {split}, but not of all")
        mixture = Mixture(samples, [part.weight for part, _ in parts], apart=_APART)
        return mixture if split == "train" else mixture.first_images(self.cfg.eval_limit)

    def _parts(self, split: Split, sort: str) -> list[tuple[ImageTextPart, AnnotationFiles]]:
        """The parts that have annotations of `sort` for `split`, and their files."""
        name = getattr(self.cfg, f"{split}_split") or self.cfg.eval_split
        parts = self.cfg.parts.values()
        known = list(dict.fromkeys(split for part in parts for split in part.splits))
        if name not in known:
            raise UserError(f"dataset.{split}_split={name}: data set {self.name!r} has the splits {', '.join(known)}")
        found = [(part, part.splits[name]) for part in parts if name in part.splits]
        found = [(part, files) for part, files in found if getattr(files, sort) is not None]
        if not found:
            raise self.lacks(f"{sort} for {split}", key=self._key(split, name, sort))
        return found

    def _key(self, split: Split, name: str, sort: str) -> str:
        """The config key that would give the annotations `sort` of a split, which the data set calls `name`."""
        return f"{sort} of the split {name!r} in dataset.parts"

    def _folder(self, part: ImageTextPart) -> ImageTextFolder:
        cache = Path(self.cfg.annotation_cache)
        return ImageTextFolder(part, cache, self.cfg.on_bad_image, self.cfg.max_pixels, skipped=self.skipped)
