"""Pictures, texts and a tokenizer that are made up, so that nothing but the model is needed to measure it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from blip2x.data.pictures import Crop
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.tasks.benchmarking.jobs import Job

_SPECIAL = 4  # the first tokens of any vocabulary: none of them is in a text


@dataclass(frozen=True)
class Noise:
    """A picture that is decoded already."""

    image: Image.Image
    name: str = "made up"

    def open(self, crop: Crop | None = None) -> Image.Image:
        """The picture; a crop of it is resized, as of any other."""
        return self.image if crop is None else crop(self.image)


class MadeUpTokenizer:
    """Gives every text the same number of tokens, `length`, or fewer where fewer are allowed; see `TextTokenizer`."""

    pad_id, bos_id, eos_id, end_id = 0, 1, 2, 3
    bos = ""

    def __init__(self, family: str, vocab_size: int, length: int):
        self.family, self.vocab_size, self.length = family, vocab_size, length
        self.dec_id = vocab_size - 1

    def tokens(self, text: str) -> list[int]:
        """None: prompts are part of the made-up text."""
        return []

    def encode(self, texts: Sequence[str], *, max_length: int | None, **_: Any) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers [B, L] of as many texts, other ones in each, and a mask of ones."""
        shape = len(texts), min(self.length, max_length or self.length)
        ids_BL = _SPECIAL + np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape) % (self.vocab_size - _SPECIAL - 1)
        return ids_BL, np.ones(shape, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The numbers as words, which takes about as long as it does in a real vocabulary."""
        return " ".join(str(int(index)) for index in ids)


def made_up_captions(job: Job, count: int) -> list[CaptionSample]:
    """`count` different pictures of the model's size with a caption each."""
    return [CaptionSample(Noise(image), (f"caption {index}",), index) for index, image in enumerate(_pictures(job, count))]


def made_up_questions(job: Job, count: int) -> list[QuestionSample]:
    """`count` different pictures with as many questions each as the benchmark's config says."""
    each, found = job.task.questions, []
    for index, image in enumerate(_pictures(job, count)):
        picture = Noise(image)
        found += [
            QuestionSample(index * each + place, picture, f"question {place}", (), "", "", index) for place in range(each)
        ]
    return found


def _pictures(job: Job, count: int) -> list[Image.Image]:
    side, rng = job.cfg.model.vision.image_size, np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
