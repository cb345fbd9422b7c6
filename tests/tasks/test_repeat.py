"""``run=outputs/NAME``: the same figures from the folder of a run, whatever has become of conf/."""

from __future__ import annotations

import json

import pytest

from blip2x.config.compose import compose_config
from blip2x.engine.run_files import TIMES
from blip2x.errors import UserError
from blip2x.models.weights.manifest import frozen_origins
from blip2x.tasks.common.launch import launch
from blip2x.tasks.pipeline import plan_stages

STEPS = ["task.batch_size=4", "task.max_steps=2", "task.max_epochs=null", "task.eval_batch_size=4"]


@pytest.fixture
def start(small, tmp_path):
    """`start(*overrides)` -> the folder of a run `r` on a few scenes; `start(run=folder)` repeats one."""

    def call(*overrides, run=None):
        few = [*small, "dataset.train_scenes=8", "dataset.test_scenes=4", "dataset.held_out_combinations=0"]
        words = [f"run={run}"] if run else [*few, f"paths.outputs={tmp_path}", "run_name=r"]
        before = set(tmp_path.iterdir())
        launch(compose_config([*words, *overrides]), ["runners/run.py", *words, *overrides])
        (folder,) = set(tmp_path.iterdir()) - before
        return folder

    return call


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def read(folder, name="repeat.json"):
    return json.loads((folder / name).read_text())


def results(folder):
    return {name: value for name, value in read(folder, "results.json").items() if isinstance(value, dict)}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_run_s_repeat_has_the_same_metrics_and_says_so(start):
    first = start("task=pretrain_stage1", "model.vision.frozen=false", "task.log_every=1", "model.qformer.dropout=0.1", *STEPS)
    again = start(run=first)
    assert again.name == "r-repeat" and lines(again) == lines(first) and results(again) == results(first)
    assert read(again)["identical"] and read(again)["changed"] == {"environment": [], "settings": []}
    said = (again / "log.txt").read_text()
    assert f"identical to {first}: " in said and "not as in" not in said
    assert (again / "overrides.yaml").read_text() == f"- run={first}\n"

    edit(first / "versions.json", '"numpy": "', '"numpy": "0.')
    other = start("seed=7", run=again.parent / "r")
    assert other.name == "r-repeat-2" and lines(other) != lines(first) and not read(other)["identical"]
    said = (other / "log.txt").read_text()
    assert "environment not as in" in said and "numpy was 0." in said and "settings not as in" in said
    assert "seed was 42, is 7" in said and f"differs from {first}: " in said and "(+" in said + "(-"


def test_a_pipeline_s_stages_are_as_they_were(start):
    """Not as they would be composed today: what their files say is another number of steps."""
    steps = ",".join(f"'{word}'" for word in STEPS)
    stages = ",".join(f"{{task: {task}, name: {name}, overrides: [{steps}]}}" for task, name in (
        ("pretrain_vision", "see"), ("pretrain_stage1", "align"))
    )  # fmt: skip
    first = start(f"task.stages=[{stages}]", "task.overrides=null")
    again = start(run=first)
    assert read(again)["identical"] and read(again)["compared"]["lines of metrics"] == len(lines(first)) > 2
    assert frozen_origins(again / "align/checkpoint") == {"vision": str(again / "see/checkpoint")}

    edit(first / "stages.json", '"max_steps": 2', '"max_steps": 1')
    task = compose_config([f"run={first}", "optim.weight_decay=0.3"]).task
    configs = [stage.config({"model.vision.weights": "/w"}) for stage in plan_stages(task, str(first))]
    found = [(cfg.task.max_steps, cfg.optim.weight_decay, cfg.model.vision.weights) for cfg in configs]
    assert found == [(1, 0.3, "/w")] * 2
    (first / "stages.json").unlink()
    with pytest.raises(UserError, match=r"stages\.json is not there, .* type the command in .*r/command\.txt"):
        start(run=first)
