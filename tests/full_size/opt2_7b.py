"""BLIP-2 with OPT-2.7B at its true size, once: write a random Hugging Face folder, load it, caption a picture.

    python tests/full_size/opt2_7b.py make FOLDER      # 7.5 GB in bfloat16, eight files
    python tests/full_size/opt2_7b.py caption FOLDER   # needs about 16 GB of memory: a CPU computes in float32

It prints seconds and peak memory. The caption is noise; what counts is that nothing is in memory twice.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from blip2x.startup import prepare_process

prepare_process()

import paddle  # noqa: E402
from PIL import Image  # noqa: E402

import blip2x  # noqa: E402
from blip2x.config.compose import compose_config  # noqa: E402
from blip2x.engine.memory import peak_memory_mib  # noqa: E402
from blip2x.models.assemblies.stage2 import build_stage2  # noqa: E402
from blip2x.models.weights.export import huggingface_config, to_huggingface, write_shards  # noqa: E402
from blip2x.models.weights.stored import BFLOAT16, StoredTensor  # noqa: E402

SHARD_GB = 1.0
ACTIVATIONS_GB = 1.5  # beyond the weights, for one picture and five beams


def make(folder: Path) -> None:
    """Random numbers of about a trained model's size, under every name of the true model."""
    cfg = compose_config(["task=caption", "model=opt2.7b", "dataset=coco"]).model
    with paddle.LazyGuard():
        model = build_stage2(cfg, vocab_size=cfg.language.vocab_size)
    block = (np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02).astype(BFLOAT16)

    def tensor(name: str, shape: tuple[int, ...]) -> StoredTensor:
        def read() -> np.ndarray:
            if "norm" in name and name.endswith(".weight"):
                return np.ones(shape, BFLOAT16)
            return np.resize(block, shape)

        return StoredTensor(name, shape, BFLOAT16, read)

    tensors = {name: tensor(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    theirs, _ = to_huggingface(tensors)
    folder.mkdir(parents=True)
    write_shards(folder, theirs, SHARD_GB)
    config = huggingface_config(cfg, tensors, end=50118, pad=1)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 50118, "pad_token_id": 1}), encoding="utf-8")


def caption(folder: Path) -> None:
    """Load in float32 and write ten tokens with five beams."""
    before = peak_memory_mib() / 1024
    started = time.perf_counter()
    model, processor = blip2x.load(folder, dtype="float32")
    seconds = time.perf_counter() - started
    size = sum(parameter.size * 4 for parameter in model.network.parameters()) / 2**30
    largest = max(parameter.size * 4 for parameter in model.network.parameters()) / 2**30
    peak = peak_memory_mib() / 1024
    print(f"loaded {size:.2f} GiB of float32 in {seconds:.1f} s; processor {processor}")
    print(f"peak {peak:.2f} GiB, {peak - size - before:.2f} above the model and the {before:.2f} of the libraries", end="; ")
    print(f"the largest tensor has {largest:.2f}")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8))
    for beams in (1, 5):
        started = time.perf_counter()
        ids = model.generate(images=[picture], num_beams=beams, max_new_tokens=10, min_new_tokens=10)
        print(f"{beams} beams: {ids.shape[1]} tokens in {time.perf_counter() - started:.1f} s: {ids[0].tolist()}")
    peak = peak_memory_mib() / 1024
    print(f"peak with captions {peak:.2f} GiB")
    if peak > size + largest + before + ACTIVATIONS_GB:
        sys.exit(f"more than the model, its largest tensor, the libraries and {ACTIVATIONS_GB} GiB of activations")


if __name__ == "__main__":
    {"make": make, "caption": caption}[sys.argv[1]](Path(sys.argv[2]))
