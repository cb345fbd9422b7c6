"""How many images a worker process loads in a second, and where the time goes.

    python tests/full_size/pipeline.py                # 640 x 480, COCO's usual size
    python tests/full_size/pipeline.py 2048x1536 64   # larger pictures, as many different ones

The pictures are made: random content with the spectrum of photographs, JPEG of quality 90. "whole" decodes all pixels before
the random crop, "draft" only as many as the crop needs, as trainings do. Images per second vary with what else the machine
does: the rounds of both kinds take turns, and the ratio is the median of theirs. The parts are in milliseconds of CPU time.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.config.dataset import OnBadImage
from blip2x.data.collate import ImageCollate
from blip2x.data.loader import build_loader
from blip2x.data.pictures import PathImage
from blip2x.data.samples import Picture, PictureSample
from blip2x.data.transforms import EvalTransform, TrainTransform

SIZES, WORKERS = (224, 364, 490), (1, 2)
BATCH, IMAGES, ROUNDS = 16, 128, 3
TRANSFORM = compose_config(["task=caption", "dataset=coco"]).dataset.transform


class WholeFirst(TrainTransform):
    """Crops pictures that were decoded at their full size."""

    def load(self, picture: Picture, rng: random.Random | None = None) -> np.ndarray:
        """Decode, then crop."""
        return self(picture.open(), rng)


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise of every scale, the finer the weaker."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for side in (4, 8, 16, 32, 64, 128, 256):
        coarse = rng.normal(scale=120 / side**0.6, size=(max(2, side * height // width), side, 3)).astype(np.float32)
        for channel in range(3):
            fine = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            total[..., channel] += np.asarray(fine)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def rate(samples: list[PictureSample], transform: TrainTransform, workers: int) -> tuple[float, float]:
    """Images per second of one worker and of all together, the time to start them left out."""
    loader = build_loader(
        samples, ImageCollate(transform), batch_size=BATCH, shuffle=True, seed=0, num_workers=workers,
        on_bad_image=OnBadImage.stop,
    )  # fmt: skip
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    after_first = sum(len(batch["image_id_B"]) for batch in batches)
    return loader.images / loader.loading_seconds, after_first / (time.perf_counter() - started)


def milliseconds(work: Callable[[int], object], count: int) -> float:
    """Of the processor for one call, the median of `count`."""
    times = []
    for number in range(count):
        started = time.process_time()
        work(number)
        times.append(1000 * (time.process_time() - started))
    return statistics.median(times)


def main(width: int, height: int, count: int) -> None:
    """Make the pictures and print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.jpg") for number in range(count)]
        for number, file in enumerate(files):
            photograph(width, height, number).save(file, quality=90)
        kilobytes = sum(file.stat().st_size for file in files) / count / 1000
        print(f"{count} pictures of {width} x {height}, {kilobytes:.0f} kB each; Pillow {Image.__version__}\n")
        pictures = [PathImage(file, 10**9) for file in files]
        samples = [PictureSample(picture, number) for number, picture in enumerate(pictures)] * max(1, IMAGES // count)

        print("| pixels | workers | images/s per worker: whole | draft | ratio | together: whole | draft |")
        print("|---|---|---|---|---|---|---|")
        for size in SIZES:
            for workers in WORKERS:
                kinds = [WholeFirst(TRANSFORM, size), TrainTransform(TRANSFORM, size)]
                rounds = [[rate(samples, kind, workers) for kind in kinds] for _ in range(ROUNDS)]
                (whole, all_whole), (draft, all_draft) = np.median(rounds, axis=0)
                ratio = statistics.median(two[0] / one[0] for one, two in rounds)
                print(f"| {size} | {workers} | {whole:.0f} | {draft:.0f} | {ratio:.2f} | {all_whole:.0f} | {all_draft:.0f} |")

        print("\n| pixels | decode whole, ms | resize | normalise | crop, draft: decode and resize | evaluation, all of it |")
        print("|---|---|---|---|---|---|")
        opened = [picture.open() for picture in pictures]
        for size in SIZES:
            evaluation, training = EvalTransform(TRANSFORM, size), TrainTransform(TRANSFORM, size)
            resized = [training._crop(random.Random(number))(image) for number, image in enumerate(opened)]
            parts = [
                milliseconds(lambda number: pictures[number].open(), count),
                milliseconds(lambda number, crop=training._crop: crop(random.Random(number))(opened[number]), count),
                milliseconds(lambda number, finish=training._normalise, ready=resized: finish(ready[number]), count),
                milliseconds(lambda number, crop=training._crop: pictures[number].open(crop(random.Random(number))), count),
                milliseconds(lambda number, load=evaluation.load: load(pictures[number]), count),
            ]
            print(f"| {size} | " + " | ".join(f"{part:.2f}" for part in parts) + " |")


if __name__ == "__main__":
    shape, number = (*sys.argv[1:], *("640x480", "64")[len(sys.argv) - 1 :])
    main(*map(int, shape.split("x")), int(number))
