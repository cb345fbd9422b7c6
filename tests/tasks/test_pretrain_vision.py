"""An eye that reads single digits and colours."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.registry import TASKS, VISION_ENCODERS
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import eval_transform


def test_it_learns_and_its_accuracies_count_patches_that_show_something(run_task, validations):
    metrics, folder = run_task("pretrain_vision", "task.max_steps=30")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in lines if "loss" in line]
    assert found[-1] < 0.7 * found[0]
    assert [line["step"] for line in validations(folder)] == [30]

    cfg = compose_config(["task=pretrain_vision", "dataset.train_scenes=64", "dataset.test_scenes=12"])
    source = build_source(cfg)
    model = PatchClassifier(VISION_ENCODERS.get(cfg.model.vision.kind)(cfg.model.vision), source.label_classes)
    load_checkpoint(folder / "checkpoint", model)
    samples = source.labels("eval", patches_per_side=3)
    images = paddle.to_tensor(np.stack([eval_transform(cfg)(sample.image.open(), None) for sample in samples]))
    for name, logits in model(images).items():
        label = np.stack([sample.labels[name] for sample in samples])
        right = (logits.numpy().argmax(axis=-1) == label)[label > 0]
        assert metrics[f"{name}_accuracy"] == pytest.approx(right.mean())


def test_photographs_have_no_labels_of_patches():
    cfg = compose_config(["task=pretrain_vision", "dataset=custom", "dataset.images=."])
    with pytest.raises(UserError, match="data set 'custom' has no patch labels; choose another data set or task"):
        TASKS.get("pretrain_vision").check(cfg)


def test_patches_have_to_fit_the_grid(run_task, tmp_path):
    with pytest.raises(UserError, match="4"):
        run_task("pretrain_vision", "model.vision.patch_size=12")
    assert not (tmp_path / "pretrain_vision").exists()
