import numpy as np

from blip2x.data.scenes.handwriting import load_handwriting
from blip2x.data.scenes.painter import BACKGROUND, PALETTE, Painter, SceneImage
from blip2x.data.scenes.scene import PlacedDigit, Scene


def test_a_digit_fills_its_cell_and_no_other():
    painter = Painter(load_handwriting().ink[:5], grid=3, cell=16)
    image = SceneImage(Scene((PlacedDigit(0, "red", row=1, column=2, source=0),)), painter, "a scene").open()
    assert image.size == (48, 48) and image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    inked = (pixels != BACKGROUND).any(axis=-1)
    assert not inked[:16].any() and not inked[32:].any() and not inked[:, :32].any()
    assert 0.2 < inked[16:32, 32:].mean() < 0.9
    assert np.abs(pixels.reshape(-1, 3) - PALETTE["red"]).sum(axis=1).min() < 25  # most ink, most colour
    assert (pixels[..., 0] >= pixels[..., 1]).all()  # nowhere another colour


def test_colours_of_the_palette_are_far_apart():
    colours = np.array(list(PALETTE.values()))
    distance = np.abs(colours[:, None] - colours[None]).sum(axis=-1) + 1000 * np.eye(len(colours), dtype=int)
    assert distance.min() > 90
