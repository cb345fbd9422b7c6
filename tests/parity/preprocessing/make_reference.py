"""Makes the pictures and arrays beside it: what Hugging Face's BLIP image processor makes of pictures of every kind.

    pip install torch==2.13.0 transformers==4.57.6 pillow
    python make_reference.py

`pixels` has what the processor gives for the opened file: it converts to RGB, drops transparency and does not turn by EXIF.
`loaded` has what it gives after Hugging Face's `load_image`, which turns the picture upright, where that is something else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import BlipImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, load_image

HERE = Path(__file__).parent
PICTURES = HERE / "pictures"
SIZE, FULL_SIZE = 56, 224
FULL = ["gradient", "tall"]  # also at the size of the published models


def drawings() -> dict[str, Image.Image]:
    """A small picture of each kind."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:70, 0:90] / 90
    waves = np.stack([np.sin(9 * x + c) * np.cos(7 * y - c) for c in range(3)], axis=-1)
    picture = Image.fromarray((127.5 + 127 * waves).astype(np.uint8))
    noise = Image.fromarray(rng.integers(0, 256, (61, 97, 3), dtype=np.uint8))
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:150, None], ramp[::-1][None, :]), axis=-1)
    checks = np.kron(np.indices((65, 65)).sum(axis=0) % 2, np.ones((2, 2))) * 255
    see_through = picture.copy()
    see_through.putalpha(Image.fromarray((255 * x).astype(np.uint8)))
    return {
        "rgb": picture,
        "grey": picture.convert("L"),
        "opaque": picture.convert("RGBA"),
        "transparent": see_through,
        "palette": picture.quantize(16),
        "bilevel": picture.convert("1"),
        "cmyk": picture.convert("CMYK"),
        "tall": picture.resize((10, 90)),
        "wide": picture.resize((160, 8)),
        "tiny": noise.resize((3, 2)),
        "point": Image.new("RGB", (1, 1), (200, 100, 50)),
        "same_size": noise.resize((SIZE, SIZE)),
        "noise": noise,
        "gradient": Image.fromarray(gradient),
        "checks": Image.fromarray(checks.astype(np.uint8)),
        "turned": picture.resize((40, 24)),  # with an EXIF mark
    }


def write(name: str, image: Image.Image) -> Path:
    """Losslessly, since JPEG's decoders differ."""
    exif = Image.Exif()
    if name == "turned":
        exif[0x0112] = 6  # turn clockwise to see it upright
    path = PICTURES / f"{name}.{'tiff' if image.mode == 'CMYK' else 'png'}"
    image.save(path, exif=exif, **({"compression": "tiff_deflate"} if image.mode == "CMYK" else {"optimize": True}))
    return path


def values(processor: BlipImageProcessor, image: Image.Image) -> np.ndarray:
    """[3, H, W]; the processor takes the height of a single pixel for its channels if it is not told."""
    return processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]


def main() -> None:
    """Write everything."""
    PICTURES.mkdir(exist_ok=True)
    arrays: dict[str, np.ndarray] = {"mean": np.array(OPENAI_CLIP_MEAN), "std": np.array(OPENAI_CLIP_STD)}
    for name, image in drawings().items():
        path = write(name, image)
        for size in [SIZE, FULL_SIZE] if name in FULL else [SIZE]:
            processor = BlipImageProcessor(size={"height": size, "width": size})
            arrays[f"pixels.{size}.{name}"] = values(processor, Image.open(path))
            loaded = values(processor, load_image(str(path)))
            if not np.array_equal(loaded, arrays[f"pixels.{size}.{name}"]):
                arrays[f"loaded.{size}.{name}"] = loaded
    np.savez_compressed(HERE / "reference.npz", **arrays)


if __name__ == "__main__":
    main()
