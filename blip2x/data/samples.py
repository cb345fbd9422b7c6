"""What data sets hand out: plain records that open their picture only when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from blip2x.data.pictures import Crop


class Picture(Protocol):
    """An image that is not decoded yet."""

    @property
    def name(self) -> str:
        """How messages and reports call the picture: a path or an address."""

    @property
    def identity(self) -> str:
        """Words that change where what `open` gives does, or whether it raises, as far as that is seen without opening it.

        Raises:
            UserError: there is no such picture.
        """

    def open(self, crop: Crop | None = None) -> Image.Image:
        """Decode to RGB; with `crop`, only that part of the upright picture, resized.

        Raises:
            UserError: there is no such picture, or it cannot be decoded.
        """


@dataclass(frozen=True)
class PictureSample:
    """An image of which nothing is known."""

    image: Picture
    image_id: int


@dataclass(frozen=True)
class CaptionSample:
    """An image and all captions known for it."""

    image: Picture
    captions: tuple[str, ...]
    image_id: int
    group: str = ""  # results are also reported per group, e.g. "held_out"; "": the data set has none

    @property
    def truth(self) -> tuple[str, ...]:
        """The captions; none where they are not known."""
        return self.captions


@dataclass(frozen=True)
class QuestionSample:
    """A question about an image; several annotators may have answered it."""

    question_id: int
    image: Picture
    question: str
    answers: tuple[str, ...]
    question_type: str
    answer_type: str
    image_id: int
    group: str = ""

    @property
    def truth(self) -> tuple[str, ...]:
        """The answers; none where they are not known."""
        return self.answers


def has_truth(samples: Sequence[CaptionSample | QuestionSample]) -> bool:
    """Whether captions or answers are known: of all samples or, of a test split whose owner keeps them, of none."""
    return len(samples) > 0 and bool(samples[0].truth)


@dataclass(frozen=True)
class LabelledImage:
    """An image with class numbers for each patch, row by row; 0 is "nothing here"."""

    image: Picture
    labels: Mapping[str, np.ndarray]  # name -> [patches] int64
