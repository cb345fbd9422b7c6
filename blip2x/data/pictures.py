"""Decoding pictures: every way in which a file can be bad ends in one sentence with its name."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from blip2x.errors import UserError

Box = tuple[float, float, float, float]  # left, top, right, bottom

# No icons (their pictures have sizes of their own, which no header tells), no pages (an EPS file is a program for Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF")

_UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # width and height change places
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)  # the upright picture's left, its top was the file's right or bottom
_REDUCTIONS = (8, 4, 2)  # by which a JPEG's decoder can divide its sides
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF and one of its values


@dataclass(frozen=True)
class Crop:
    """The part of a picture that is wanted, and how large.

    Args:
        choose: the box, from width and height of the upright picture; None: all of it.
        size: width and height to resize the box to (bicubic, box and resize in one pass).
    """

    choose: Callable[[int, int], Box | None]
    size: tuple[int, int]

    def __call__(self, image: Image.Image) -> Image.Image:
        """The part of a picture that is decoded already."""
        return resize(image, self.choose(*image.size), self.size)


def resize(image: Image.Image, box: Box | None, size: tuple[int, int]) -> Image.Image:
    """The box of a picture, None: all of it, resized to `size`."""
    if image.size == size and box is None:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


@dataclass(frozen=True)
class PathImage:
    """A picture file."""

    path: Path
    max_pixels: int

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def identity(self) -> str:
        """Path, size and time of the last change, and what size is refused."""
        return f"{file_identity(self.path, f'image {self.path}')} {self.max_pixels}"

    def open(self, crop: Crop | None = None) -> Image.Image:
        """Decode to RGB, see `decode_picture`; raises `UserError` if that is impossible."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError as error:
            raise UserError(f"image {self.path} does not exist") from error
        except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
            raise UserError(f"image {self.path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        return decode_picture(data, self.name, self.max_pixels, crop)


def file_identity(path: Path, what: str) -> str:
    """Absolute path, bytes and time of the last change of a file; raises `UserError` about `what` if it cannot be seen."""
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise UserError(f"{what} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"


def decode_picture(data: bytes, name: str, max_pixels: int, crop: Crop | None = None) -> Image.Image:
    """The picture upright (EXIF), as RGB; transparent parts become white, 16-bit grey is scaled to 8; of films the first frame.

    With `crop`, only that part at that size: a JPEG is then decoded at a half, a quarter or an eighth of its size where the
    part still has at least as many pixels as are wanted of it.

    Raises:
        UserError: empty, truncated or corrupt data, a format that is not in `FORMATS`, more than `max_pixels`, or pixels of
            unknown range.
    """
    if not data:
        raise UserError(f"image {name} is empty (0 bytes)")
    try:
        # GIF and WebP take memory for their pixels as soon as they are opened: there Pillow has to look before we can.
        limit = max_pixels if data.startswith((b"GIF8", b"RIFF")) else None
        with _size_limit(limit), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UserError(
                    f"image {name} has {image.width} x {image.height} pixels, more than dataset.max_pixels={max_pixels}; "
                    "scale it down or raise the limit"
                )
            if crop is not None and isinstance(image, JpegImageFile):
                return _decode_part(image, name, crop)
            upright = _decode(image, name)
            return upright if crop is None else crop(upright)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"image {name} has more than twice as many pixels as dataset.max_pixels={max_pixels}; "
            "scale it down or raise the limit"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can read; formats are {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders meet garbage with all sorts of exceptions, from SyntaxError to struct.error
        raise UserError(f"image {name} is corrupt or truncated: {error}") from error


def _decode(image: Image.Image, name: str) -> Image.Image:
    image.load()
    if image.format == "TIFF" and image.mode.startswith("I") and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        # Pillow would show a negative
        raise UserError(f"image {name} has 16-bit grey with 0 for white; save it with 0 for black")
    orientation = exif_orientation(image)  # after the pixels: some formats have it behind them
    return to_rgb(image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image, name)


def _decode_part(image: JpegImageFile, name: str, crop: Crop) -> Image.Image:
    orientation = exif_orientation(image)
    width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
    left, top, right, bottom = crop.choose(width, height) or (0, 0, width, height)
    spare = min((right - left) / crop.size[0], (bottom - top) / crop.size[1])
    reduction = next((divisor for divisor in _REDUCTIONS if divisor <= spare), 1)
    image.draft(None, (image.width // reduction, image.height // reduction))
    upright = _decode(image, name)
    # Reduced sides are rounded up. What is too much stands at the file's right and bottom: turned, it may come before the box.
    before_x = upright.width - width / reduction if orientation in _FROM_RIGHT else 0
    before_y = upright.height - height / reduction if orientation in _FROM_BOTTOM else 0
    box = left / reduction + before_x, top / reduction + before_y, right / reduction + before_x, bottom / reduction + before_y
    return resize(upright, box, crop.size)


def exif_orientation(image: Image.Image) -> int:
    """EXIF's; 1, upright, where there is none or it cannot be read: a picture is not lost for its camera's notes."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as with pixels, garbage is met with all sorts
        return 1


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An opened picture as RGB; transparent parts become white, 16-bit grey is scaled to 8. Errors as `decode_picture`."""
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        image = _eight_bits(image, name)
    if image.mode == "F":
        raise UserError(f"image {name} has floating-point pixels of unknown range; save it with 8 bits per channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "RGB":
        return image  # convert() would copy it
    return image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    pixels = np.asarray(image)
    if pixels.max(initial=0) > np.iinfo(np.uint16).max or pixels.min(initial=0) < 0:
        raise UserError(f"image {name} has 32-bit pixels or negative ones; save it with 8 or 16 bits per channel")
    grey = Image.fromarray((pixels // 257).astype(np.uint8))
    if "transparency" in image.info:  # one of the 65,536 greys is not shown
        shown = Image.fromarray(np.where(pixels == image.info["transparency"], 0, 255).astype(np.uint8))
        return Image.merge("LA", (grey, shown))
    return grey


@contextmanager
def _size_limit(pixels: int | None) -> Iterator[None]:
    """Pillow's limit, which ours replaces, is a global: above it Pillow warns, above twice of it, it raises."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
