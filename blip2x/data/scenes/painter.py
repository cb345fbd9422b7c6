"""From a scene to pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import numpy as np
from PIL import Image

from blip2x.data.pictures import Crop
from blip2x.data.scenes.scene import Scene

PALETTE = {  # RGB, 0..255
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 255),
    "yellow": (245, 225, 40),
    "white": (245, 245, 245),
    "purple": (170, 50, 215),
    "orange": (250, 140, 20),
    "cyan": (50, 215, 230),
    "pink": (255, 140, 190),
    "brown": (140, 85, 40),
}
BACKGROUND = np.array([20, 20, 20], dtype=np.float32)


class Painter:
    """Paints each digit over exactly one cell of a dark canvas of `grid` x `grid` cells of `cell` pixels."""

    def __init__(self, ink: np.ndarray, *, grid: int, cell: int):
        self.grid = grid
        self.cell = cell
        # [images, cell, cell, 1] in 0..1; bicubic overshoots at edges
        self.glyphs = np.stack([_enlarge(image, cell) for image in ink]).clip(0, 1)[..., None]

    @cached_property
    def identity(self) -> str:
        """Words that stand for all that decides how scenes are painted."""
        rules = repr((self.grid, self.cell, PALETTE, BACKGROUND.tolist()))
        return sha256(self.glyphs.tobytes() + rules.encode()).hexdigest()

    def paint(self, scene: Scene) -> np.ndarray:
        """The scene as [height, width, RGB] uint8."""
        side = self.grid * self.cell
        canvas = np.broadcast_to(BACKGROUND, (side, side, 3)).copy()
        for placed in scene.digits:
            top, left = placed.row * self.cell, placed.column * self.cell
            colour = np.array(PALETTE[placed.colour], dtype=np.float32)
            canvas[top : top + self.cell, left : left + self.cell] += self.glyphs[placed.source] * (colour - BACKGROUND)
        return canvas.round().astype(np.uint8)


def _enlarge(ink: np.ndarray, cell: int) -> np.ndarray:
    return np.asarray(Image.fromarray(ink).resize((cell, cell), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class SceneImage:
    """A scene that is painted when it is opened."""

    scene: Scene
    painter: Painter
    name: str

    @property
    def identity(self) -> str:
        """The scene, and how it is painted."""
        return f"{self.scene} {self.painter.identity}"

    def open(self, crop: Crop | None = None) -> Image.Image:
        """Paint the scene, RGB; with `crop`, only that part of it, resized."""
        image = Image.fromarray(self.painter.paint(self.scene))
        return image if crop is None else crop(image)
