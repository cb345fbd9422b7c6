"""Stage 1 on its own: what it trains, keeps and hands on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from blip2x.errors import UserError
from blip2x.models.weights.manifest import read_manifest
from blip2x.tasks.common import stage1_training


@pytest.fixture
def models(watch_training):
    return watch_training(stage1_training)


def changed(models, part):
    before, after = models[-2:]
    return {name for name in before if name.startswith(part) and not np.array_equal(before[name], after[name])}


def test_a_frozen_image_encoder_stays_and_all_else_learns(run_task, demo, models, validations):
    vision = demo("model=tiny_opt").checkpoint("pretrain_vision")
    more = ["task.contrast_steps=2", "task.eval_every=2"]
    metrics, folder = run_task("pretrain_stage1", f"model.vision.weights={vision}", *more)
    before, after = validations(folder)
    assert (before["step"], after["step"]) == (2, 4) and 0 < after["eval_itm_accuracy"] < 1
    assert before["eval_temperature"] != after["eval_temperature"] and before["i2t_recall@10"] != after["i2t_recall@10"]
    assert metrics == {name: after[name] for name in metrics} and "eval_itm_accuracy" in metrics
    assert changed(models, "vision.") == set()
    rest = {name for name in models[-1] if not name.startswith("vision.")}
    assert changed(models, "") == rest
    assert read_manifest(folder / "checkpoint")["tensors"].keys() == rest
    assert metrics["chance"] == pytest.approx(1 / 12)
    found = {f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert found <= metrics.keys() and all(0 <= metrics[name] <= 1 for name in found)


def test_an_image_encoder_that_is_not_frozen_learns_and_is_saved(run_task, models):
    _, folder = run_task("pretrain_stage1", "model.vision.frozen=false")
    assert changed(models, "vision.") == {name for name in models[0] if name.startswith("vision.")}
    assert read_manifest(folder / "checkpoint")["tensors"].keys() == models[0].keys()


def test_weights_that_no_loss_reaches_yet_stay(run_task, models):
    _, folder = run_task("pretrain_stage1", "model.vision.frozen=false", "task.contrast_steps=4")
    assert changed(models, "itm_head") == changed(models, "qformer.text.head") == set()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any("itm" in line or "lm" in line for line in lines)


def test_it_goes_on_from_an_earlier_stage_1(run_task, demo, models):
    before = demo("model=tiny_opt")
    models.clear()
    run_task("pretrain_stage1", f"model.weights={before.checkpoint('pretrain_stage1')}")
    saved = load_file(before.checkpoint("pretrain_stage1") / "model.safetensors")
    for name, start in models[0].items():
        if not name.startswith("vision."):
            np.testing.assert_array_equal(start, saved[name], err_msg=name)


def test_texts_have_to_fit_the_q_former(run_task):
    with pytest.raises(UserError, match=r"model\.qformer\.max_positions=64"):
        run_task("pretrain_stage1", "task.max_txt_len=65")
