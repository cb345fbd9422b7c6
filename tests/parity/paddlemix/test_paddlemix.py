"""Checkpoints of PaddleMIX through `blip2x.load`: bit by bit the model of LAVIS's files, from which they were made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import blip2x

HERE = Path(__file__).parent
LAVIS, LANGUAGE = HERE.parent / "lavis", HERE.parent / "language"
REFERENCE = np.load(LAVIS / "reference.npz")
HEADS = {"model.vision.num_heads": 2, "model.qformer.num_heads": 3}
OPT_HEADS = {**HEADS, "model.language.num_heads": 3}
ATOL = 1e-5  # as in ../lavis/test_lavis.py


def parameters(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.network.named_parameters()}


def assert_same(model: Any, other: Any) -> None:
    ours, theirs = parameters(model), parameters(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_stage_1(close: Callable[..., None]):
    model, processor = blip2x.load(HERE / "stage1" / "model_state.pdparams", settings=HEADS)
    other, _ = blip2x.load(LAVIS / "stage1.pth", settings=HEADS)
    assert processor is None
    assert_same(model, other)
    parts = model(
        pixel_values=REFERENCE["image"],
        input_ids=REFERENCE["ids"],
        attention_mask=REFERENCE["mask"],
        negatives=(REFERENCE["negative_image"], REFERENCE["negative_text"]),
    )
    for ours, reference in (("itc", "itc"), ("itm", "itm"), ("itg", "lm")):
        close("losses of stage 1", float(parts[ours]), REFERENCE[reference], atol=ATOL)


def test_stage_2_with_its_language_model(close: Callable[..., None]):
    model, _ = blip2x.load(HERE / "stage2_opt" / "model_state.pdparams", settings=OPT_HEADS)
    weights = {"model.vision.weights": str(LAVIS / "eva_vit_g.pth"), "model.language.weights": str(LANGUAGE / "opt")}
    other, _ = blip2x.load(LAVIS / "stage2_opt.pth", settings={**OPT_HEADS, **weights})
    assert_same(model, other)
    close(
        "stage 2: prompt",
        model.encode_image(pixel_values=REFERENCE["image"], output="projected"),
        REFERENCE["opt_proj"],
        atol=ATOL,
    )
    ids = np.array([[2, 9, 4, 17]] * len(REFERENCE["image"]))
    asked = {"pixel_values": REFERENCE["image"], "input_ids": ids, "attention_mask": np.ones_like(ids), "max_new_tokens": 6}
    np.testing.assert_array_equal(model.generate(**asked), other.generate(**asked))
