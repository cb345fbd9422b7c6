"""What is to be known of pictures, found by opening each once, in several processes.

P pictures.
"""

from __future__ import annotations

import io
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from blip2x.data.audit.counts import key_of
from blip2x.data.pictures import FORMATS, PathImage, decode_picture, exif_orientation
from blip2x.data.samples import Picture
from blip2x.data.shards import StoredImage
from blip2x.errors import UserError

CHUNK = 32  # pictures that a process is given at a time
_AHEAD = 4  # chunks per process on their way
_SIDE = 4  # of the small picture by which near duplicates are confirmed
_COLUMNS, _ROWS = 9, 8  # of the difference hash, which has a bit per pair of neighbours
_LEAST_STEP = 2.0  # levels between neighbours that count as a difference: less is what compression changes
_GREY = 4  # levels by which red, green and blue may differ in a picture without colour
SMALL = _SIDE * _SIDE * 3  # bytes


class Facts(NamedTuple):
    """What a picture is like."""

    width: int  # as stored, before it is turned upright
    height: int
    mode: str  # Pillow's, as stored
    grey: bool  # no colour is to be seen
    transparent: bool
    rotated: bool  # EXIF says to turn or mirror it
    animated: bool
    content: int  # 64 bits that stand for the file's bytes; for what is no file, for its pixels
    shape: int  # difference hash, 64 bits
    small: bytes  # `SMALL` of them: RGB, row by row


@dataclass(frozen=True)
class Broken:
    """A picture that cannot be used."""

    sentence: str


def inspect(picture: Picture) -> Facts | Broken:
    """Open a picture and look at it; whatever is raised meanwhile becomes `Broken`, so that no picture ends a long run."""
    try:
        data = _data(picture)
        pixels = picture.open() if data is None else decode_picture(data, picture.name, picture.max_pixels)
        return _facts(pixels, data)
    except UserError as error:
        return Broken(str(error))
    except Exception as error:
        return Broken(f"image {picture.name} cannot be looked at: {type(error).__name__}: {error}")


def _facts(pixels: Image.Image, data: bytes | None) -> Facts:
    mode, (width, height) = pixels.mode, pixels.size
    transparent = rotated = animated = False
    if data is not None:
        with _any_size(), Image.open(io.BytesIO(data), formats=FORMATS) as stored:
            mode, (width, height) = stored.mode, stored.size
            transparent = mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in stored.info
            rotated = exif_orientation(stored) != 1
            animated = _is_animated(stored)
    content = key_of(data if data is not None else pixels.tobytes() + repr(pixels.size).encode())
    fine = np.asarray(pixels.resize((4 * _COLUMNS, 4 * _ROWS), Image.Resampling.BOX), dtype=np.int16)
    grey = int((fine.max(-1) - fine.min(-1)).max()) <= _GREY
    small = pixels.resize((_SIDE, _SIDE), Image.Resampling.BOX).tobytes()
    return Facts(width, height, mode, grey, transparent, rotated, animated, content, _difference_hash(fine), small)


def inspect_all(pictures: Iterable[Picture], processes: int) -> Iterator[list[Facts | Broken]]:
    """What `inspect` says of each, in their order, at most `CHUNK` at a time; 0 processes: in this one.

    Raises:
        UserError: a process died, as happens where memory is short.
    """
    rest = iter(pictures)
    chunks = iter(lambda: list(islice(rest, CHUNK)), [])
    if not processes:
        yield from map(_inspect_chunk, chunks)
        return
    # fresh processes: a fork would inherit locks that this one's threads hold
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_inspect_chunk, chunk))
                if len(waiting) >= processes * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that opens pictures was killed; if memory is short, dataset.num_workers=0 needs least"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _inspect_chunk(pictures: list[Picture]) -> list[Facts | Broken]:
    return [inspect(picture) for picture in pictures]


def _data(picture: Picture) -> bytes | None:
    """The bytes of a picture's file; None where there is no file, or it cannot be read: opening the picture says why."""
    try:
        if isinstance(picture, PathImage):
            return picture.path.read_bytes()
        if isinstance(picture, StoredImage):
            with picture.path.open("rb") as file:
                file.seek(picture.offset)
                return file.read(picture.length)
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        pass
    return None


def _is_animated(stored: Image.Image) -> bool:
    try:
        # MPO: a camera's JPEG with a preview behind it
        return stored.format != "MPO" and getattr(stored, "is_animated", False)
    except Exception:  # there is a second frame, and it is corrupt: nobody shows it to a model
        return True


@contextmanager
def _any_size() -> Iterator[None]:
    """Without Pillow's limit: the picture has been opened already."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _difference_hash(fine: np.ndarray) -> int:
    """Bit by bit, whether a field is darker than its left neighbour; `fine` [4 * rows, 4 * columns, RGB]."""
    field_RC = fine.mean(-1).reshape(_ROWS, 4, _COLUMNS, 4).mean((1, 3))
    bits = field_RC[:, :-1] > field_RC[:, 1:] + _LEAST_STEP
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
