"""Small copies of pictures that a run keeps for its report.

B pictures, F bytes of all their copies.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip2x.data.collate import Batch, ImageCollate, Transform
from blip2x.data.samples import CaptionSample, Picture, PictureSample, QuestionSample
from blip2x.engine.run import Run
from blip2x.engine.run_files import SMALL
from blip2x.errors import UserError
from blip2x.pages import data_uri

MOST_PICTURES = 600  # that a run keeps
EXAMPLES = 8  # that loggers get of a validation
_LONGER_SIDE = 320  # pixels
_PNG = b"\x89PNG"  # how such a file starts


def opened(picture: Picture) -> Image.Image | None:
    """A picture for loggers; None where it cannot be read, which the loader has told already."""
    try:
        return picture.open()
    except UserError:
        return None


def thumbnail(picture: Image.Image) -> bytes:
    """A small copy as a file's content: JPEG where the picture was made smaller, else PNG."""
    large = max(picture.size) > _LONGER_SIDE
    if large:
        picture = picture.copy()
        picture.thumbnail((_LONGER_SIDE, _LONGER_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if large else "PNG")
    return buffer.getvalue()


def write_thumbnail(run: Run, image_id: int, content: bytes) -> str:
    """Put what `thumbnail` gave into the run's folder; its path there."""
    name = f"{image_id}.{'png' if content.startswith(_PNG) else 'jpg'}"
    run.path("images", name).write_bytes(content)
    return f"images/{name}"


def thumbnail_uri(content: bytes) -> str:
    """A file that `thumbnail` made, for a page that needs nothing but itself."""
    return data_uri(content, "image/png" if content.startswith(_PNG) else "image/jpeg")


def is_small(content: bytes) -> bool:
    """Whether a page should enlarge a file that `thumbnail` made, and keep its pixels sharp, as the report does."""
    with Image.open(io.BytesIO(content)) as image:
        return max(image.size) < SMALL


def one_in(count: int) -> int:
    """One picture in how many is kept of `count`: no more than `MOST_PICTURES`, evenly chosen."""
    return max(1, -(-count // MOST_PICTURES))


def save_pictures(run: Run, samples: Sequence[CaptionSample | QuestionSample], first: Iterable[int] = ()) -> dict[int, str]:
    """Keep small copies of images for the report: image id -> path below the run's folder.

    Those of `first`, image ids, are kept in any case; of all others as many as fit, evenly chosen.
    """
    images = {sample.image_id: sample.image for sample in samples}
    if not run.context.is_main:
        return {}
    chosen, paths = dict.fromkeys(first), {}
    others = [image_id for image_id in images if image_id not in chosen]
    room = MOST_PICTURES - len(chosen)
    for image_id in (*chosen, *(others[:: max(1, -(-len(others) // room))] if room > 0 else ())):
        try:
            paths[image_id] = write_thumbnail(run, image_id, thumbnail(images[image_id].open()))
        except UserError:  # the loader has counted and named it
            continue
    return paths


@dataclass(frozen=True)
class ThumbnailCollate:
    """As `ImageCollate`, and small copies from the same look at each picture: thumbnail_F, thumbnail_bytes_B (0: none).

    Copied are the images whose number is a multiple of `every`.
    """

    transform: Transform
    every: int

    def load(self, sample: PictureSample, rng: random.Random) -> tuple[np.ndarray, int, bytes]:
        """Open the picture."""
        picture = sample.image.open()
        copy = thumbnail(picture) if sample.image_id % self.every == 0 else b""
        return self.transform(picture, rng), sample.image_id, copy

    def __call__(self, items: list[tuple[np.ndarray, int, bytes]]) -> Batch:
        """Stack."""
        copies = b"".join(copy for _, _, copy in items)
        return {
            **ImageCollate(self.transform)([item[:2] for item in items]),
            "thumbnail_F": np.frombuffer(copies + b" ", dtype=np.uint8),  # paddle's workers cannot hand over an empty array
            "thumbnail_bytes_B": np.array([len(copy) for _, _, copy in items], dtype=np.int64),
        }


def thumbnails(batch: Batch) -> dict[int, bytes]:
    """Image id -> small copy, of a batch of `ThumbnailCollate`."""
    end_B = np.cumsum(batch["thumbnail_bytes_B"])
    start_B = end_B - batch["thumbnail_bytes_B"]
    places = zip(batch["image_id_B"].tolist(), start_B, end_B, strict=True)
    return {image_id: batch["thumbnail_F"][start:end].tobytes() for image_id, start, end in places if end > start}
