"""From a config to a finished run folder, and what is left where there is none."""

from __future__ import annotations

import json

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.tasks.common.launch import launch

FEW = ["dataset.train_scenes=8", "dataset.test_scenes=4", "dataset.held_out_combinations=2"]
STEPS = ["task.batch_size=4", "task.max_steps=2", "task.max_epochs=null", "task.log_every=1", "task.eval_batch_size=4"]


@pytest.fixture
def command(small, tmp_path):
    """`command(*overrides)` -> the checked config of a run called `r`."""
    return lambda *overrides: compose_config([*small, *FEW, f"paths.outputs={tmp_path}/outputs", "run_name=r", *overrides])


def test_a_run_folder_holds_the_run(command, tmp_path, capsys):
    results = launch(command("task=pretrain_vision", *STEPS), ["runners/run.py", "task=pretrain_vision"])
    folder = tmp_path / "outputs/r"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "command.txt", "versions.json", "metrics.jsonl", "results.json", "report.html"} <= names
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["pretrain_vision"].keys() == {"digit_accuracy", "colour_accuracy"}
    assert results["seconds"] > 0 and results["peak_memory_gb"] > 0
    assert (folder / "checkpoint/manifest.json").is_file()
    assert (folder / "command.txt").read_text() == "runners/run.py task=pretrain_vision\n"
    types = json.loads((folder / "dtypes.json").read_text())
    assert "vision" in types and set(types.values()) == {"float32"}
    said = capsys.readouterr().out
    assert "blip2x pretrain_vision" in said and "digit_accuracy" in said and "report:" in said


def test_the_same_seed_gives_the_same_numbers(command, tmp_path):
    words = ["task=pretrain_language", *STEPS, "overwrite=true"]
    metrics = [launch(command(*words), ["x"])["pretrain_language"] for _ in range(2)]
    assert metrics[0] == metrics[1]
    assert launch(command(*words, "seed=1"), ["x"])["pretrain_language"] != metrics[0]


def test_what_is_wrong_is_told_before_a_folder_is_made(command, tmp_path):
    with pytest.raises(UserError, match="task=caption needs a trained model"):
        launch(command("task=caption"), ["x"])
    assert not (tmp_path / "outputs").exists()


def test_an_older_run_is_kept(command, tmp_path):
    (tmp_path / "outputs/r").mkdir(parents=True)
    with pytest.raises(UserError, match="r exists already"):
        launch(command("task=pretrain_language", *STEPS), ["x"])


def test_a_task_that_fails_leaves_its_folder_without_results(command, tmp_path):
    with pytest.raises(UserError, match="do not fill one batch"):
        launch(command("task=pretrain_language", *STEPS, "task.batch_size=99"), ["x"])
    assert (tmp_path / "outputs/r/config.yaml").is_file() and not (tmp_path / "outputs/r/results.json").exists()
