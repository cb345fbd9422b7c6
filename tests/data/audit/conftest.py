"""Small data sets with what is to be found in them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from blip2x.config.dataset import CustomConfig, OnBadImage, TransformConfig
from blip2x.data.audit.survey import Settings, survey
from blip2x.data.sources.custom import Custom


@pytest.fixture
def scene():
    """`scene(number, side=96)`: a picture of six by six coloured fields, another one for each number."""

    def make(number, side=96):
        fields = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(fields).resize((side, side), Image.Resampling.BICUBIC)

    return make


@pytest.fixture
def bars():
    """A progress bar that keeps (description, steps announced, steps made, samples)."""
    made = []

    @contextmanager
    def progress(description, steps, unit):
        counts = []
        yield SimpleNamespace(advance=counts.append)
        made.append((description, steps, len(counts), sum(counts)))

    progress.made = made
    return progress


@pytest.fixture
def settings(bars):
    """`settings(near=4)`: settings that look at everything, in this process."""

    def make(**changes):
        looked_at = {"open_images": None, "near": 2, "max_txt_len": 12, "sheet": 4, "processes": 0, "seed": 0, "tokenizers": {}}
        return Settings(**{**looked_at, "progress": bars, "say": lambda line: None, **changes})

    return make


@pytest.fixture
def custom(tmp_path):
    """`custom(train_captions=[...])`: a data set of those entries; pictures are in `images` of the temporary folder."""
    (tmp_path / "images").mkdir()

    def make(**entries):
        keys = [f"{split}_{sort}" for split in ("train", "val", "eval") for sort in ("captions", "questions")]
        files = dict.fromkeys(keys)
        for key, rows in entries.items():
            path = tmp_path / f"{key}.json"
            path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
            files[key] = str(path)
        transform = TransformConfig(mean=[0.5] * 3, std=[0.5] * 3, crop_scale=None, flip=False)
        cfg = CustomConfig(
            name="custom",
            transform=transform,
            on_bad_image=OnBadImage.stop,
            num_workers=0,
            max_pixels=10**6,
            eval_limit=None,
            images=str(tmp_path / "images"),
            annotation_cache=str(tmp_path / "cache"),
            **files,
        )
        return Custom(cfg)

    return make


@pytest.fixture
def look(settings):
    """`look(source)`: (the survey of it, lines of bad_images.txt)."""

    def run(source, **changes):
        bad = StringIO()
        return survey(source, settings(**changes), bad), bad.getvalue().splitlines()

    return run


@pytest.fixture
def picture(tmp_path, scene):
    """`picture("a.png", 3)`: save the third scene under that name; or another picture."""

    def save(name, number, **options):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (number if isinstance(number, Image.Image) else scene(number)).save(path, **options)
        return name

    return save
