"""Small models of each family, and folders of Hugging Face's kind with a tokenizer of as many words as the model has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2x
from blip2x.data.tokenize import TextTokenizer, train_tokenizer
from blip2x.models.vision.eva_vit import EvaVit

PARITY = Path(__file__).parents[1] / "parity"
FOLDERS = {"opt": PARITY / "decoding/opt", "t5": PARITY / "decoding/t5", "retrieval": PARITY / "huggingface/retrieval"}
FAMILY = {"opt": "opt", "t5": "t5", "retrieval": "bert"}
VOCABULARY = {"opt": 50, "t5": 50, "retrieval": 37}
SIZE = {"opt": 12, "t5": 12, "retrieval": 15}
LAVIS_STAGE1 = PARITY / "lavis/stage1.pth"
LAVIS_HEADS = {"model.vision.num_heads": 2, "model.qformer.num_heads": 3}


def words(family: str, count: int) -> TextTokenizer:
    """A tokenizer of `count` tokens: the family's special ones, and word0, word1, ..."""
    special = train_tokenizer(["word0"], family).vocab_size - 1
    tokenizer = train_tokenizer([" ".join(f"word{n}" for n in range(count - special))], family)
    assert tokenizer.vocab_size == count
    return tokenizer


@pytest.fixture(scope="session")
def named(tmp_path_factory) -> Callable[[str], Path]:
    """`named(kind)`: the folder of that kind with a tokenizer."""
    root = tmp_path_factory.mktemp("named")
    for kind, folder in FOLDERS.items():
        shutil.copytree(folder, root / kind)
        words(FAMILY[kind], VOCABULARY[kind]).tokenizer.save(str(root / kind / "tokenizer.json"))
    return lambda kind: root / kind


@pytest.fixture(scope="session")
def load(named) -> Callable[..., tuple[Any, Any]]:
    """`load(kind, with_tokenizer=True)`: a model that tests share, and its processor."""
    loaded: dict[tuple[str, bool], tuple[Any, Any]] = {}

    def once(kind: str, with_tokenizer: bool = True) -> tuple[Any, Any]:
        key = kind, with_tokenizer
        if key not in loaded:
            if kind == "lavis":
                own = {"model.qformer.tokenizer": str(named("retrieval"))} if with_tokenizer else {}  # as many words
                loaded[key] = blip2x.load(LAVIS_STAGE1, settings=LAVIS_HEADS | own)
            elif kind == "retrieval":
                with pytest.warns(UserWarning, match="no head"):
                    loaded[key] = blip2x.load(named(kind) if with_tokenizer else FOLDERS[kind])
            else:
                loaded[key] = blip2x.load(named(kind) if with_tokenizer else FOLDERS[kind])
        return loaded[key]

    return once


@pytest.fixture
def edited(named, tmp_path) -> Callable[..., Path]:
    """`edited(kind, tokenizer=..., **files)`: a copy with changed settings, by file; None: without that file."""

    def make(kind: str, *, tokenizer: bool = True, **files: dict[str, Any] | None) -> Path:
        folder = shutil.copytree(named(kind), tmp_path / "edited")
        if not tokenizer:
            (folder / "tokenizer.json").unlink()
        for name, content in files.items():
            path = folder / f"{name}.json"
            if content is None:
                path.unlink()
            else:
                path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
        return folder

    return make


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """The number of images in each call of an image encoder."""
    calls, forward = [], EvaVit.forward

    def count(self: EvaVit, image_BCHW: Any) -> Any:
        calls.append(len(image_BCHW))
        return forward(self, image_BCHW)

    monkeypatch.setattr(EvaVit, "forward", count)
    return calls


@pytest.fixture
def pixels() -> Callable[[str, int], np.ndarray]:
    """`pixels(kind, count)`: images as arrays."""

    def make(kind: str, count: int) -> np.ndarray:
        size = SIZE.get(kind, 12)
        return np.random.default_rng(0).standard_normal([count, 3, size, size]).astype(np.float32)

    return make


@pytest.fixture
def pictures() -> list[Image.Image]:
    """Three pictures of different sizes."""
    generator = np.random.default_rng(1)
    sizes = [(20, 31), (50, 40), (12, 12)]
    return [Image.fromarray(generator.integers(0, 255, [*size, 3], dtype=np.uint8)) for size in sizes]
