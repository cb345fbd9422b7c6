"""Captions and their scores, and fine-tuning on captions."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from blip2x.errors import UserError
from blip2x.models.weights.manifest import read_manifest


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def stage2(demo):
    return f"model.weights={demo('model=tiny_opt').checkpoint('pretrain_stage2')}"


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
def test_a_checkpoint_alone_writes_what_the_pipeline_wrote(run_task, demo, encoded, model):
    run = demo(f"model={model}")
    encoded.clear()
    metrics, folder = run_task("caption", f"model={model}", f"model.weights={run.checkpoint('pretrain_stage2')}")
    assert metrics == run.results["caption"]
    assert rows(folder) == rows(run.folder / "caption")
    assert encoded == [5, 5, 2]  # each image once, though beams share it
    submitted = json.loads((folder / "leaderboard.json").read_text())
    assert submitted == [{"image_id": row["image_id"], "caption": row["caption"]} for row in rows(folder)]


def test_a_checkpoint_remembers_its_shape(run_task, demo):
    """Also of the parts that were frozen, so that nothing else has to be said."""
    run = demo("model=tiny_t5")
    metrics, folder = run_task("caption", "model=auto", f"model.weights={run.checkpoint('pretrain_stage2')}")
    assert metrics == run.results["caption"] and rows(folder) == rows(run.folder / "caption")


def test_the_blind_caption_is_one_and_scored_beside(run_task, stage2):
    metrics, folder = run_task("caption", stage2, "task.metrics=[CIDEr]", "task.blind_baseline=true")
    assert len({row["blind"] for row in rows(folder)}) == 1
    assert {name.split("/")[-1] for name in metrics} == {"CIDEr", "ci95_low_CIDEr", "ci95_high_CIDEr", "blind_CIDEr", "images"}


def test_several_captions_per_image_best_first_and_none_blind(run_task, stage2):
    several = ["task.num_beams=3", "task.num_return_sequences=2", "task.blind_baseline=false"]
    metrics, folder = run_task("caption", stage2, "task.metrics=[CIDEr]", *several)
    assert all(len(row["captions"]) == 2 and row["captions"][0] == row["caption"] for row in rows(folder))
    assert {name.split("/")[-1] for name in metrics} == {"CIDEr", "ci95_low_CIDEr", "ci95_high_CIDEr", "images"}


def test_fine_tuning_trains_and_its_checkpoint_captions_alike(run_task, stage2, demo, encoded, validations):
    steps = ["task.max_steps=8", "task.max_epochs=null", "task.batch_size=8", "task.log_every=4", "task.max_txt_len=20"]
    only = ["task.metrics=[CIDEr]", "task.blind_baseline=false"]
    encoded.clear()
    metrics, folder = run_task("caption", stage2, *only, "task.train=true", *steps, "task.eval_every=4")
    assert sum(encoded) == 8 * 8 + 2 * 12  # no image is encoded again for the result
    half, last = validations(folder)
    assert (half["step"], last["step"]) == (4, 8) and last["CIDEr"] == metrics["CIDEr"]
    manifest = read_manifest(folder / "checkpoint")
    assert (manifest["kind"], manifest["step"]) == ("caption", 8)
    assert not any(name.startswith(("vision.", "language.")) for name in manifest["tensors"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    earlier = demo("model=tiny_opt").results["pretrain_stage2"]["eval_loss"]
    assert next(line["eval_loss"] for line in lines if "eval_loss" in line) < earlier
    written = rows(folder)
    alone = folder.rename(folder.with_name("tuned")) / "checkpoint"
    assert run_task("caption", *only, f"model.weights={alone}")[0] == metrics
    assert Counter(row["caption"] for row in rows(folder)) == Counter(row["caption"] for row in written)


def test_options_that_contradict_each_other_are_told_before_work(run_task, stage2, tmp_path):
    with pytest.raises(UserError, match="num_return_sequences"):
        run_task("caption", stage2, "task.num_beams=2", "task.num_return_sequences=3")
    assert not (tmp_path / "caption").exists()
