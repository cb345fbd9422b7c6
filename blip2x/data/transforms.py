"""From a picture to the array that an image encoder reads."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

from blip2x.config.dataset import TransformConfig
from blip2x.data.feature_store import identity_of
from blip2x.data.pictures import Box, Crop, resize
from blip2x.data.samples import Picture

# Of the rules below: to be raised where they give other numbers, so that what was kept of the old ones is not used.
VERSION = 1

_RATIO = (3 / 4, 4 / 3)  # width to height of a random crop
_TRIES = 10


class EvalTransform:
    """The whole picture resized to the square (bicubic, shape not kept), then normalised."""

    def __init__(self, cfg: TransformConfig, image_size: int):
        self.size = (image_size, image_size)
        std = np.asarray(cfg.std, dtype=np.float32)
        self._scale = 1 / (255 * std)
        self._shift = np.asarray(cfg.mean, dtype=np.float32) / std

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> np.ndarray:
        """RGB picture to [3, size, size] float32; `rng` is not used."""
        return self._normalise(resize(image, None, self.size))

    def variant(self, picture: Picture, rng: random.Random | None = None) -> str:
        """Words that tell what `load` gives of a picture from what other transforms of these pixels and this size give."""
        return "whole"

    def load(self, picture: Picture, rng: random.Random | None = None) -> np.ndarray:
        """As `__call__`, of a picture that is not decoded yet: at its full size, as in the reference."""
        return self(picture.open(), rng)

    def _normalise(self, image: Image.Image) -> np.ndarray:
        out = np.empty((3, *self.size), dtype=np.float32)
        for channel, band in enumerate(image.split()):  # several times as quick as all channels of a pixel together
            np.multiply(np.asarray(band), self._scale[channel], out=out[channel])
            out[channel] -= self._shift[channel]
        return out


class Lot(random.Random):
    """What a sample's choices are drawn from; `turn` is the number of its fixed crop, were there infinitely many."""

    turn: int = 0

    @classmethod
    def of(cls, seed: int, epoch: int, place: int, copy: int = 0) -> Lot:
        """That of the sample at a place, the same in each process; `copy` is how often it came before in this epoch."""
        lot = cls(f"{seed}/{epoch}/{place}")
        lot.turn = epoch + copy
        return lot


class TrainTransform(EvalTransform):
    """A random crop resized to the square in one pass, perhaps mirrored, then normalised.

    Args:
        cfg: whether there is a crop, and a mirror.
        image_size: pixels.
        crops: each picture has so many crops, mirrored or not, and a lot's `turn` says which is taken; they follow from the end
            of the picture's name alone, so that all runs have the same. None: a new one each time, drawn from the lot.
    """

    def __init__(self, cfg: TransformConfig, image_size: int, *, crops: int | None = None):
        super().__init__(cfg, image_size)
        self.crop_scale = cfg.crop_scale
        self.flip = cfg.flip
        self._crops = crops

    @property
    def _draws(self) -> bool:
        return self.crop_scale is not None or self.flip

    def variant(self, picture: Picture, rng: random.Random | None = None) -> str:
        """See `EvalTransform.variant`.

        Raises:
            ValueError: crops are not fixed, so that nothing can be kept of a picture.
        """
        if not self._draws:
            return "decoded as small as it serves"
        if self._crops is None:
            raise ValueError("the crops of this transform are drawn anew each time")
        return f"{self._fixed(picture, rng)}, scale {self.crop_scale}, flip {self.flip}"

    def _fixed(self, picture: Picture, rng: Lot) -> str:
        """What a fixed crop is drawn from: of the name only file and folder, or each machine's mount would have others."""
        return f"crop {rng.turn % self._crops} of {'/'.join(picture.name.split('/')[-2:])}"

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> np.ndarray:
        """RGB picture to [3, size, size] float32; `rng` decides crop and mirror."""
        return self._mirror_and_normalise(self._crop(rng)(image), rng)

    def load(self, picture: Picture, rng: random.Random | None = None) -> np.ndarray:
        """As `__call__`, of a picture that is not decoded yet: no larger than its crop needs it."""
        if self._draws and self._crops is not None and rng is not None:
            rng = random.Random(identity_of(self._fixed(picture, rng)))  # a name may have bytes that are no text
        return self._mirror_and_normalise(picture.open(self._crop(rng)), rng)

    def _crop(self, rng: random.Random | None) -> Crop:
        if rng is None:
            raise ValueError("a training transform draws by lot and needs rng")
        scale = self.crop_scale
        return Crop(lambda width, height: None if scale is None else random_box(width, height, scale, rng), self.size)

    def _mirror_and_normalise(self, image: Image.Image, rng: random.Random) -> np.ndarray:
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._normalise(image)


def random_box(width: int, height: int, scale: list[float], rng: random.Random) -> Box:
    """A crop with a share of the area between scale[0] and scale[1] and a ratio of 3:4 to 4:3.

    Where no such box fits in ten tries (very long pictures), the largest central one of an allowed ratio.
    """
    low, high = map(math.log, _RATIO)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
