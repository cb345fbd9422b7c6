"""From a config to a finished run folder, and what is left where there is none."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from datetime import datetime
from typing import ClassVar

import pytest

from blip2x.config.compose import compose_config
from blip2x.engine import memory
from blip2x.engine.folders import is_held
from blip2x.engine.result import TaskResult
from blip2x.errors import Interrupted, UserError
from blip2x.tasks.common import launch as module
from blip2x.tasks.common.launch import launch

FEW = ["dataset.train_scenes=8", "dataset.test_scenes=4", "dataset.held_out_combinations=2"]
STEPS = ["task.batch_size=4", "task.max_steps=2", "task.max_epochs=null", "task.log_every=1", "task.eval_batch_size=4"]


@pytest.fixture
def command(small, tmp_path):
    """`command(*overrides)` -> the checked config of a run called `r`."""
    return lambda *overrides: compose_config([*small, *FEW, f"paths.outputs={tmp_path}/outputs", "run_name=r", *overrides])


def test_a_run_folder_holds_the_run(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "_jobs", 0)  # as in a process of its own
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


def test_a_run_without_its_report_is_complete(command, tmp_path, monkeypatch, capsys):
    def fail(folder):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(module, "write_report", fail)
    launch(command("task=pretrain_vision", *STEPS), ["x"])
    assert json.loads((tmp_path / "outputs/r/status.json").read_text())["state"] == "complete"
    assert "warning: no report: by nothing" in capsys.readouterr().out
    assert "ZeroDivisionError" in (tmp_path / "outputs/r/log.txt").read_text()


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
    assert "do not fill one batch" in (tmp_path / "outputs/r/report.html").read_text(encoding="utf-8")


@pytest.fixture
def ending(command, tmp_path, monkeypatch):
    """`ending(error)` -> (status.json while the task is working, and after it has raised `error`; log.txt)."""

    def call(error, *overrides, **changes):
        during = []

        class Task:
            computes: ClassVar[bool] = False

            def __init__(self, cfg, run):
                self.run_folder = run

            @classmethod
            def check(cls, cfg):
                pass

            def run(self):
                folder = self.run_folder.folder
                during.append(json.loads((folder / "status.json").read_text()))
                assert is_held(folder)
                self.run_folder.console.print("[bold]at work[/]")
                warnings.warn("take care", stacklevel=1)
                if error:
                    raise error
                return TaskResult({"a": 1.0})

        monkeypatch.setattr(module.TASKS, "get", lambda kind: Task)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                launch(replace(command("task=audit", *overrides), **changes), ["x", "y z"])
            except BaseException as raised:
                assert type(raised) is type(error)
        folder = tmp_path / "outputs/r"
        assert not is_held(folder) and [path.name for path in folder.parent.iterdir()] == ["r"]
        return during[0] if during else None, json.loads((folder / "status.json").read_text()), (folder / "log.txt").read_text()

    return call


@pytest.mark.parametrize(
    ("error", "state", "sentence"),
    [
        (None, "complete", None),
        (UserError("a.png is no image; leave it out"), "failed", "a.png is no image; leave it out"),
        (KeyError("b"), "failed", "KeyError: 'b'"),
        (MemoryError(), "failed", "MemoryError"),
        (Interrupted("SIGTERM in step 3"), "interrupted", "SIGTERM in step 3"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_status_says_how_the_run_ended(ending, error, state, sentence):
    during, after, log = ending(error)
    assert during == {"state": "running", "error": None, "started": during["started"], "ended": None}
    assert (after["state"], after["error"]) == (state, sentence)
    times = [datetime.fromisoformat(after[name]) for name in ("started", "ended")]
    assert times[0] <= times[1] and times[0].utcoffset().total_seconds() == 0
    assert log.split("\n")[0].endswith("UTC $ x 'y z'") and "\nat work\n" in log and "UserWarning: take care" in log
    is_ours = isinstance(error, (UserError, Interrupted))
    assert ("Traceback" in log and "in run\n" in log) == (error is not None and not is_ours)
    assert sentence is None or sentence in log


def test_a_complete_run_stays_complete(ending, tmp_path, capsys):
    _, before, _ = ending(None)
    during, after, log = ending(KeyError("not reached"), "resume=auto", "logger=tensorboard")
    assert during is None and after == before and log.count("UTC $") == 1
    assert "nothing to go on with" in capsys.readouterr().out
    assert len((tmp_path / "outputs/r/command.txt").read_text().splitlines()) == 1
    assert not (tmp_path / "outputs/r/tensorboard").exists()


def test_what_has_changed_since_is_told_where_a_run_goes_on(ending, tmp_path):
    ending(KeyError("b"))
    path = tmp_path / "outputs/r/hardware.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "an abacus"}))
    during, after, log = ending(None, "resume=auto")
    assert during["state"] == "running" and after["state"] == "complete"
    assert "cpu was an abacus, is " in log and "figures may differ" in log


def test_a_run_that_goes_on_with_itself_as_a_repeat_is_not_compared_with_itself(ending, tmp_path, capsys):
    folder = tmp_path / "outputs/r"
    ending(KeyError("b"))
    ending(None, "resume=auto", run=str(folder))
    assert "identical" not in capsys.readouterr().out and not (folder / "repeat.json").exists()
