"""The real captions of COCO 2014, which lie in a jar of pycocoevalcap."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from pycocoevalcap import spice


def read_coco(split: str) -> dict[int, list[str]]:
    """Image id -> captions as people wrote them, of train or val."""
    with zipfile.ZipFile(Path(spice.__file__).with_name("spice-1.0.jar")) as jar:
        rows = json.loads(jar.read(f"coco/annotations/captions_{split}2014.json"))["annotations"]
    captions: dict[int, list[str]] = {}
    for row in rows:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return captions


@pytest.fixture(scope="session")
def coco_val() -> dict[int, list[str]]:
    return read_coco("val")


@pytest.fixture(scope="session")
def coco_train() -> dict[int, list[str]]:
    return read_coco("train")
