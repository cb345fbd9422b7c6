"""One image folder with its annotation files: what `custom` is, and what a mixture has several of."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from blip2x.config.dataset import AnnotationFiles, ImageTextPart, OnBadImage
from blip2x.data.presence import missing_images
from blip2x.data.rows import Format
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.sequences import CaptionTable, Chosen, QuestionTable, Samples
from blip2x.data.tables import TableFile, caption_table, question_table
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS

_NAMED = 3  # missing images that a message names


def image_folder(path: str) -> Path:
    """The folder; raises `UserError` if there is none."""
    if not Path(path).is_dir():
        raise UserError(f"image folder {path} does not exist")
    return Path(path)


@dataclass
class ImageTextFolder:
    """Reads annotation files and checks that the images they name are there.

    Raises:
        UserError: there is no such folder.
    """

    part: ImageTextPart
    cache: Path  # of tables made from annotation files
    on_bad_image: OnBadImage
    max_pixels: int
    skipped: list[str] = field(default_factory=list)  # a sentence per missing image, as opening it would say

    def __post_init__(self):
        self.images = image_folder(self.part.images)

    def captions(self, files: AnnotationFiles, *, clean: bool) -> Samples[CaptionSample]:
        """One sample per image, in the order of the file; with `clean`, captions are prepared for training."""
        found = caption_table(self._reader(files), self.cache, _say)
        samples = CaptionTable(found, self.images, self.max_pixels, clean=clean)
        unusable = found.table.schema.metadata[b"unusable"].decode()
        if clean and unusable and self.on_bad_image is OnBadImage.stop:
            raise UserError(f"{unusable} (dataset.on_bad_image=skip leaves such images out)")
        if clean and not found.table["captions"][0].as_py():
            raise UserError(f"{files.captions} has no caption to train on")
        return self._there(samples, found, files.captions)

    def questions(self, files: AnnotationFiles) -> Samples[QuestionSample]:
        """One sample per question, in the order of the file."""
        found = question_table(self._reader(files), self.cache, _say)
        return self._there(QuestionTable(found, self.images, self.max_pixels), found, files.questions)

    def _reader(self, files: AnnotationFiles) -> Format:
        return ANNOTATION_FORMATS.get(self.part.format)(files, self.images)

    def _there(self, samples: Samples, found: TableFile, name: str) -> Samples:
        """Those of `samples` whose images exist."""
        rows, table = missing_images(found, self.images), found.table
        if not len(rows):
            return samples
        images = table["image"].unique() if "question" in table.column_names else table["image"]
        gone = list(dict.fromkeys(table["image"].take(pa.array(rows)).to_pylist()))
        named = ", ".join(gone[:_NAMED]) + (", ..." if len(gone) > _NAMED else "")
        message = f"{len(gone)} of {len(images)} images of {name} are missing in {self.images}: {named}"
        if self.on_bad_image is OnBadImage.stop or len(gone) == len(images):
            raise UserError(f"{message}; check dataset images, or leave them out with dataset.on_bad_image=skip")
        known = set(self.skipped)
        sentences = [f"image {self.images / image} does not exist" for image in gone]
        self.skipped += [sentence for sentence in sentences if sentence not in known]
        there = np.setdiff1d(np.arange(len(samples)), rows, assume_unique=True)
        return Chosen(samples, there, left_out=len(samples) - len(there))


def _say(text: str) -> None:
    print(text, file=sys.stderr)
