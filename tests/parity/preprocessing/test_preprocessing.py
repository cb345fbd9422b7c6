"""What Hugging Face's image processor (transformers 4.57.6) makes of a picture, and what we make of it.

Both resize eight-bit pixels with Pillow's bicubic filter, so all that may differ is the rounding of float32 afterwards: numbers
reach 2.7, which float32 holds to 2.4e-7. One grey level more or less would be 1.4e-2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2x.config.dataset import TransformConfig
from blip2x.data.pictures import PathImage
from blip2x.data.transforms import EvalTransform

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "reference.npz")
CASES = [key.split(".")[1:] for key in REFERENCE.files if key.startswith("pixels.")]  # size, name
CONFIG = TransformConfig(mean=REFERENCE["mean"].tolist(), std=REFERENCE["std"].tolist(), crop_scale=None, flip=False)
ATOL = 2e-6


def path(name: str) -> Path:
    return next((HERE / "pictures").glob(f"{name}.*"))


def test_every_kind_of_picture_is_there():
    kinds = {"RGB", "L", "RGBA", "P", "1", "CMYK"}
    assert {Image.open(file).mode for file in (HERE / "pictures").iterdir()} == kinds and len(CASES) == 18


@pytest.mark.parametrize(("size", "name"), CASES)
def test_resized_and_normalised(size, name, close):
    image = Image.open(path(name)).convert("RGB")
    close("resized and normalised", EvalTransform(CONFIG, int(size))(image), REFERENCE[f"pixels.{size}.{name}"], atol=ATOL)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_opened_files(size, name, close):
    """Ours turns pictures upright as `load_image` does (the processor alone and LAVIS do not), and shows white behind glass."""
    ours = EvalTransform(CONFIG, int(size))(PathImage(path(name), 10**8).open())
    pixels, loaded = f"pixels.{size}.{name}", f"loaded.{size}.{name}"
    theirs = REFERENCE[loaded if loaded in REFERENCE else pixels]
    if name != "transparent":
        close("opened, resized and normalised", ours, theirs, atol=ATOL)
        return
    picture = Image.open(path(name))
    pasted = Image.new("RGB", picture.size, "white")
    pasted.paste(picture, mask=picture.getchannel("A"))
    one_level = 1 / 255 / REFERENCE["std"].min()  # the two ways to mix round differently
    close("transparent on white", ours, EvalTransform(CONFIG, int(size))(pasted), atol=one_level)
    assert np.abs(ours - theirs).max() > 1  # theirs shows the hidden colours


def test_only_loading_turns_a_picture():
    """The two references differ for that picture, so the tests above tell upright from lying."""
    assert [key for key in REFERENCE.files if key.startswith("loaded.")] == ["loaded.56.turned"]
    assert np.abs(REFERENCE["loaded.56.turned"] - REFERENCE["pixels.56.turned"]).mean() > 0.1
