"""What tests of loggers share: configs as the command line makes them, and rows with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip2x.config.compose import compose_config


@pytest.fixture
def config():
    """`config("wandb", "mode=offline")`: the config of one logger."""

    def make(kind: str, *words: str) -> Any:
        return compose_config([f"logger={kind}", *(f"logger.{kind}.{word}" for word in words)]).logger[kind]

    return make


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> tuple[list[dict[str, Any]], Path]:
    """Three captions, the first with a picture and a map of attention, the second with a picture, and their folder."""
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (640, 320), "red").save(folder / "1.png")
    Image.new("L", (8, 8)).save(folder / "1-attention.png")
    Image.new("RGB", (20, 10), "blue").save(folder / "2.png")
    found = [
        {"image": "1.png", "attention": "1-attention.png", "caption": "a red | wall", "scores": {"CIDEr": 1.5}},
        {"image": "2.png", "caption": "a blue wall", "references": ["a wall", "blue"], "scores": {"CIDEr": 0.5}},
        {"image": None, "caption": "not shown", "scores": {"CIDEr": 0.0}},
    ]
    return [{"stage": "caption", "image_id": place, **row} for place, row in enumerate(found)], folder
