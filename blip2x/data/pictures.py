"""Decoding pictures: every way in which a file can be bad ends in one sentence with its name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from blip2x.errors import UserError


@dataclass(frozen=True)
class PathImage:
    """A picture file."""

    path: Path
    max_pixels: int

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self) -> Image.Image:
        """Decode to RGB; raises `UserError` if that is impossible."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"image {self.path} does not exist") from error
        except OSError as error:
            raise UserError(f"image {self.path} cannot be read: {error.strerror}") from error
        return decode_picture(data, self.name, self.max_pixels)


def decode_picture(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture upright (EXIF), as RGB; transparent parts become white, 16-bit grey is scaled to 8.

    Raises:
        UserError: empty, truncated or corrupt data, no picture at all, more than `max_pixels`, or floating-point pixels.
    """
    if not data:
        raise UserError(f"image {name} is empty (0 bytes)")
    try:
        with _own_size_limit(), Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise UserError(
                    f"image {name} has {image.width} x {image.height} pixels, more than dataset.max_pixels={max_pixels}; "
                    "scale it down or raise the limit"
                )
            image.load()
            return to_rgb(ImageOps.exif_transpose(image), name)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can read") from error
    except Exception as error:  # decoders meet garbage with all sorts of exceptions, from SyntaxError to struct.error
        raise UserError(f"image {name} is corrupt or truncated: {error}") from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An opened picture as RGB; transparent parts become white, 16-bit grey is scaled to 8. Errors as `decode_picture`."""
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        pixels = np.asarray(image)
        if pixels.max(initial=0) > np.iinfo(np.uint16).max or pixels.min(initial=0) < 0:
            raise UserError(f"image {name} has 32-bit pixels; save it with 8 or 16 bits per channel")
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"image {name} has floating-point pixels of unknown range; save it with 8 bits per channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _own_size_limit() -> Iterator[None]:
    """Pillow's limit, which `max_pixels` replaces, is a global that warns at 89 and raises at 179 million pixels."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
