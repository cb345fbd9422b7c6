"""What a data set gives as its files have it: no caption is prepared for training, and no missing image stops it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from blip2x.config.dataset import AnnotationFiles, ImageTextConfig
from blip2x.data.presence import missing_images
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.sequences import CaptionTable, Mixture, QuestionTable
from blip2x.data.source import Source, Split
from blip2x.data.tables import caption_table, question_table
from blip2x.registry import ANNOTATION_FORMATS

Sort = Literal["captions", "questions"]
SPLITS: tuple[Split, ...] = ("train", "val", "eval")
SORTS: tuple[Sort, ...] = ("captions", "questions")


@dataclass(frozen=True)
class Given:
    """The annotations of one sort for one split, those of missing images among them."""

    samples: Sequence[CaptionSample | QuestionSample]
    missing: np.ndarray  # places of the samples whose image is not there, rising
    left_out: list[str] = field(default_factory=list)  # sentences on images that the source itself left out


class _AllCaptions(CaptionTable):
    """Captions that are given twice for an image stay there twice."""

    def sample(self, place: int) -> CaptionSample:
        captions = tuple(self._value("captions", place))
        return CaptionSample(self._picture(place), captions, self._value("image_id", place), self._value("group", place))


def files_of(source: Source, split: Split, sort: Sort) -> dict[str, AnnotationFiles] | None:
    """By part of the data set, the files that `read_given` reads; equal to another split's if both are the same samples.

    None: the data set has no files, or none of that sort.
    """
    cfg = getattr(source, "cfg", None)
    return (_files(cfg, split, sort) or None) if isinstance(cfg, ImageTextConfig) else None


def _files(cfg: ImageTextConfig, split: Split, sort: Sort) -> dict[str, AnnotationFiles]:
    name = getattr(cfg, f"{split}_split") or cfg.eval_split
    given = {part: its.splits.get(name) for part, its in cfg.parts.items()}
    return {part: files for part, files in given.items() if files is not None and getattr(files, sort) is not None}


def read_given(source: Source, split: Split, sort: Sort, say: Callable[[str], None]) -> Given | None:
    """What `source` gives for `split`; None: it has nothing of that sort.

    Raises:
        UserError: its annotation files are not there or not what they should be.
    """
    cfg = getattr(source, "cfg", None)
    if isinstance(cfg, ImageTextConfig):
        return _of_files(cfg, split, sort, say)
    if getattr(type(source), sort) is getattr(Source, sort):
        return None
    known = len(source.skipped)
    samples = getattr(source, sort)(split)
    return Given(samples, np.array([], dtype=np.int64), source.skipped[known:])


def _of_files(cfg: ImageTextConfig, split: Split, sort: Sort, say: Callable[[str], None]) -> Given | None:
    samples, missing, start = [], [], 0
    for name, files in _files(cfg, split, sort).items():
        part = cfg.parts[name]
        images = Path(part.images)
        reader, cache = ANNOTATION_FORMATS.get(part.format)(files, images), Path(cfg.annotation_cache)
        if sort == "captions":
            found = caption_table(reader, cache, say)
            samples.append(_AllCaptions(found, images, cfg.max_pixels, clean=False))
        else:
            found = question_table(reader, cache, say)
            samples.append(QuestionTable(found, images, cfg.max_pixels))
        missing.append(missing_images(found, images) + start)
        start += len(found.table)
    if not samples:
        return None
    # images are told apart by their paths here, so that their numbers may meet
    return Given(Mixture(samples, [1.0] * len(samples), apart=0), np.concatenate(missing))
