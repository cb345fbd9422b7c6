"""One image folder with its annotation files: what `custom` is, and what `mixture` has several of."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from blip2x.config.dataset import OnBadImage
from blip2x.data.annotations import Entry, read_entries
from blip2x.data.pictures import PathImage
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.tokenize import clean_caption
from blip2x.errors import UserError

_NAMED = 3  # missing images that a message names


@dataclass
class ImageTextFolder:
    """Reads annotation files and checks that the images they name are there.

    Image numbers are those of the file (``image_id``, or the number at its end, as in "coco_522418"; without it, the number at
    the end of the image's name) where each image has one of its own; else images are counted from 0.
    """

    images: Path
    on_bad_image: OnBadImage
    max_pixels: int
    skipped: list[str] = field(default_factory=list)  # a sentence per missing image, as opening it would say

    def __post_init__(self):
        if not self.images.is_dir():
            raise UserError(f"image folder {self.images} does not exist")

    def captions(self, path: str, *, clean: bool) -> list[CaptionSample]:
        """One sample per image, in the order of the file; with `clean`, captions are prepared for training."""
        captions: dict[str, list[str]] = {}
        entries = read_entries(path)
        numbers = image_numbers(entries)
        for entry in entries:
            texts = entry.texts("caption")
            prepared = [clean_caption(text) for text in texts] if clean else texts
            if not all(prepared):
                raise UserError(f"{entry.where}: 'caption' is empty but for punctuation: {texts}")
            captions.setdefault(entry.image, []).extend(prepared)
        there = self._there(captions, path)
        return [CaptionSample(self._picture(image), tuple(dict.fromkeys(captions[image])), numbers[image]) for image in there]

    def questions(self, path: str) -> list[QuestionSample]:
        """One sample per entry; `question_id` is the file's where all have an integer of their own, else they are counted."""
        entries = read_entries(path)
        numbers = image_numbers(entries)
        there = set(self._there((entry.image for entry in entries), path))
        ids = [entry.values.get("question_id") for entry in entries]
        if not all(isinstance(number, int) for number in ids):
            ids = list(range(len(entries)))
        elif len(set(ids)) < len(ids):
            twice = next(number for number in ids if ids.count(number) > 1)
            raise UserError(f"{path}: question_id {twice} is given more than once")
        samples = []
        for number, entry in zip(ids, entries, strict=True):
            question, answers = entry.text("question"), entry.texts("answer")
            if entry.image in there:
                samples.append(
                    QuestionSample(
                        question_id=number,
                        image=self._picture(entry.image),
                        question=question,
                        answers=answers,
                        question_type=str(entry.values.get("question_type", question.lower().split()[0])),
                        answer_type=str(entry.values.get("answer_type", "other")),
                        image_id=numbers[entry.image],
                    )
                )
        return samples

    def _there(self, images: Iterable[str], path: str) -> list[str]:
        """Those of `images` that exist, without repeats. One listing per folder: a look at each file is slow over a network."""
        wanted = list(dict.fromkeys(images))
        listings = {folder: _listing(self.images / folder) for folder in {os.path.dirname(image) for image in wanted}}
        missing = [image for image in wanted if os.path.basename(image) not in listings[os.path.dirname(image)]]
        if not missing:
            return wanted
        named = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        message = f"{len(missing)} of {len(wanted)} images of {path} are missing in {self.images}: {named}"
        if self.on_bad_image is OnBadImage.stop or len(missing) == len(wanted):
            raise UserError(f"{message}; check dataset images, or leave them out with dataset.on_bad_image=skip")
        known, gone = set(self.skipped), set(missing)
        sentences = [f"image {self.images / image} does not exist" for image in missing]
        self.skipped += [sentence for sentence in sentences if sentence not in known]
        return [image for image in wanted if image not in gone]

    def _picture(self, image: str) -> PathImage:
        return PathImage(self.images / image, self.max_pixels)


def image_numbers(entries: list[Entry]) -> dict[str, int]:
    """Image path -> number, see `ImageTextFolder`."""
    found = {entry.image: _number(entry) for entry in entries}
    distinct = None not in found.values() and len(set(found.values())) == len(found)
    return {image: number if distinct else index for index, (image, number) in enumerate(found.items())}


def _number(entry: Entry) -> int | None:
    given = entry.values.get("image_id", os.path.splitext(entry.image)[0])
    match = re.search(r"\d{1,12}$", str(given))
    return int(match.group()) if match else None


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
