"""From a decoded picture to the array that an image encoder reads."""

from __future__ import annotations

import math
import random

import numpy as np
from PIL import Image

from blip2x.config.dataset import TransformConfig

_RATIO = (3 / 4, 4 / 3)  # width to height of a random crop
_TRIES = 10
Box = tuple[float, float, float, float]  # left, top, right, bottom


class EvalTransform:
    """The whole picture resized to the square (bicubic, shape not kept), then normalised."""

    def __init__(self, cfg: TransformConfig, image_size: int):
        self.size = (image_size, image_size)
        std = np.asarray(cfg.std, dtype=np.float32)
        self._scale = 1 / (255 * std)
        self._shift = np.asarray(cfg.mean, dtype=np.float32) / std

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> np.ndarray:
        """RGB picture to [3, size, size] float32; `rng` is not used."""
        return self._normalise(self._resize(image, None))

    def _resize(self, image: Image.Image, box: Box | None) -> Image.Image:
        if image.size == self.size and box is None:
            return image
        return image.resize(self.size, Image.Resampling.BICUBIC, box=box)

    def _normalise(self, image: Image.Image) -> np.ndarray:
        return np.ascontiguousarray((np.asarray(image, dtype=np.float32) * self._scale - self._shift).transpose(2, 0, 1))


class TrainTransform(EvalTransform):
    """A random crop resized to the square in one pass, perhaps mirrored, then normalised."""

    def __init__(self, cfg: TransformConfig, image_size: int):
        super().__init__(cfg, image_size)
        self.crop_scale = cfg.crop_scale
        self.flip = cfg.flip

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> np.ndarray:
        """RGB picture to [3, size, size] float32; `rng` decides crop and mirror."""
        if rng is None:
            raise ValueError("a training transform draws by lot and needs rng")
        box = None if self.crop_scale is None else random_box(image.width, image.height, self.crop_scale, rng)
        resized = self._resize(image, box)
        if self.flip and rng.random() < 0.5:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._normalise(resized)


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
