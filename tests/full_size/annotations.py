"""Opening time and memory of a data set of many annotation rows: python tests/full_size/annotations.py [rows]

Makes a file of captions in BLIP's form, each of an image of its own, and folders whose listings are made up, for want of ten
million files. Prints what the first and the second opening take, the memory of a process that trains on it and of its workers,
and the size of the sampler's state.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from blip2x.config.dataset import AnnotationFiles, ImageTextPart, OnBadImage
from blip2x.data import presence
from blip2x.data.image_text import ImageTextFolder
from blip2x.data.loader import build_loader
from blip2x.data.sequences import Mixture
from blip2x.engine.training_state import Position

_IN_FOLDER = 10_000


def image(row: int) -> str:
    return f"{row // _IN_FOLDER:05d}/{row:09d}.jpg"


def write(path: Path, rows: int) -> None:
    with path.open("w") as file:
        file.write("[")
        for row in range(rows):
            caption = f"a man number {row} riding a wave on top of a surfboard"
            entry = {"caption": caption, "image": image(row), "image_id": f"cc_{row}"}
            file.write(("," if row else "") + json.dumps(entry))
        file.write("]")


class Numbers:
    """A collate without pictures."""

    def load(self, sample, rng):
        return sample.image_id, len(rng.choice(sample.captions))

    def __call__(self, items):
        return {"image_id_B": np.array(items)}


def memory(*, own: bool = False) -> str:
    """Of this process: what it has touched, or what is its own alone."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    names = ("Private_Clean", "Private_Dirty") if own else ("Rss",)
    return f"{sum(int(fields[name].split()[0]) for name in names) / 1024:,.0f} MB"


def use(folder: ImageTextFolder, files: AnnotationFiles, label: str) -> None:
    """Open, draw an epoch's order, and take 200 batches with two workers."""
    start = time.monotonic()
    samples = Mixture([folder.captions(files, clean=True)], [1.0], apart=1)
    opened = time.monotonic() - start
    loader = build_loader(
        samples, Numbers(), batch_size=64, shuffle=True, seed=0, num_workers=0, on_bad_image=OnBadImage.stop, drop_last=True
    )
    batches = iter(loader)
    next(batches)
    drawn = time.monotonic() - start - opened
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(loader, rank)) for rank in range(2)]
    for worker in workers:
        worker.start()
    start = time.monotonic()
    for _ in range(200):
        next(batches)
    rate = 200 * 64 / (time.monotonic() - start)
    times = f"opened in {opened:.2f} s, first batch after another {drawn:.2f} s, {rate:,.0f} samples/s"
    print(f"{label}: {len(samples):,} images; {times}")
    print(f"  this process: {memory()} resident, {memory(own=True)} its own")
    for worker in workers:
        worker.join()


def work(loader, rank: int) -> None:
    """What a worker process of the loader does."""
    for _, _batch in zip(range(200), loader, strict=False):
        pass
    print(f"  worker {rank}: {memory()} resident, {memory(own=True)} its own")


def apart(function, *arguments) -> None:
    """In a process of its own, whose memory is only what it uses."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def first(folder: ImageTextFolder, files: AnnotationFiles) -> None:
    """The first opening, and its peak of memory."""
    presence._listing = lambda path: [os.path.basename(image(int(path.name) * _IN_FOLDER + n)) for n in range(_IN_FOLDER)]
    start = time.monotonic()
    folder.captions(files, clean=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"first opening: {time.monotonic() - start:.0f} s, {peak:,.0f} MB at most")


def main() -> None:
    """All of it."""
    rows = int(sys.argv[1].replace("_", "")) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for row in range(0, rows, _IN_FOLDER):
            (root / "images" / image(row)).parent.mkdir(parents=True)
        path = root / "captions.json"
        write(path, rows)
        print(f"{rows:,} rows, {path.stat().st_size / 1e9:.2f} GB of JSON")
        folder = ImageTextFolder(ImageTextPart(images=str(root / "images")), root / "cache", OnBadImage.stop, 10**8)
        files = AnnotationFiles(captions=str(path))
        apart(first, folder, files)
        print(f"table: {sum(p.stat().st_size for p in (root / 'cache').iterdir()) / 1e9:.2f} GB")
        apart(use, folder, files, "again")
        print(f"sampler's state: {len(pickle.dumps(Position(3, 123_456)))} bytes")


if __name__ == "__main__":
    main()
