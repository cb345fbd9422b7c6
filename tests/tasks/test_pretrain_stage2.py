"""Stage 2 on its own: a reader and an eye that stay as they are, and queries that learn to speak to the reader."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from blip2x.models.weights.manifest import read_manifest
from blip2x.tasks import pretrain_stage2


@pytest.fixture
def models(watch_training):
    return watch_training(pretrain_stage2)


def weights(run):
    return [
        f"model.weights={run.checkpoint('pretrain_stage1')}",
        f"model.language.weights={run.checkpoint('pretrain_language')}",
    ]


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
def test_eye_and_reader_stay_bit_for_bit_and_all_else_learns(run_task, demo, models, validations, model):
    metrics, folder = run_task("pretrain_stage2", f"model={model}", *weights(demo(f"model={model}")), "task.eval_every=2")
    before, after = validations(folder)
    assert before["eval_loss"] > after["eval_loss"] and before["blind_eval_loss"] == after["blind_eval_loss"]
    before, after = models[-2:]
    learned = {name for name in before if not np.array_equal(before[name], after[name])}
    assert learned == {name for name in before if not name.startswith(("vision.", "language."))}
    assert read_manifest(folder / "checkpoint")["tensors"].keys() == learned
    assert metrics.keys() == {"eval_loss", "blind_eval_loss"} and metrics["eval_loss"] != metrics["blind_eval_loss"]


def test_the_encoder_of_a_reader_may_get_the_first_words(run_task, demo):
    run = demo("model=tiny_t5")
    whole, _ = run_task("pretrain_stage2", "model=tiny_t5", *weights(run))
    split, _ = run_task("pretrain_stage2", "model=tiny_t5", "task.prefix_split=true", *weights(run))
    assert split["eval_loss"] != whole["eval_loss"]


def test_it_goes_on_from_an_earlier_stage_2(run_task, demo, models):
    stage2 = demo("model=tiny_opt").checkpoint("pretrain_stage2")
    run_task("pretrain_stage2", f"model.weights={stage2}")
    for name, saved in load_file(stage2 / "model.safetensors").items():
        np.testing.assert_array_equal(models[-2][name], saved, err_msg=name)
