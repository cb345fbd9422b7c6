"""Every option and every experiment composes into checked dataclasses."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2x.config.compose import CONF_FOLDER, compose_config
from blip2x.registry import TASKS

WEIGHTS = Path(__file__).resolve().parents[1] / "parity" / "huggingface" / "opt"
NEEDED = {
    "compare": ["runs=outputs"],
    "custom": ["dataset.images=photos"],
    "predict": ["task.inputs=[cat.jpg]"],
    "auto": [f"model.weights={WEIGHTS}"],
}


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_FOLDER / group).glob("*.yaml"))


def cases() -> list[list[str]]:
    groups = ["task", "model", "dataset", "optim", "parallelism", "precision", "logger", "paths"]
    parts = [f"model/{part}" for part in ("vision", "qformer", "language")]
    return [[f"{group}={name}", *NEEDED.get(name, [])] for group in [*groups, *parts] for name in options(group)]


@pytest.mark.parametrize("overrides", cases(), ids=lambda words: words[0])
def test_option_composes(overrides):
    compose_config(overrides)


@pytest.mark.parametrize("path", sorted((CONF_FOLDER / "experiment").rglob("*.yaml")), ids=lambda path: path.stem)
def test_experiment_composes(path: Path):
    compose_config([f"experiment={path.relative_to(CONF_FOLDER / 'experiment').with_suffix('')}"])


@pytest.mark.parametrize(
    "path", sorted((CONF_FOLDER / "recipe").rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_recipe_names_a_data_set_and_a_task_and_composes(path: Path):
    dataset, task = path.parent.name, path.stem
    assert dataset in options("dataset") and task in options("task")  # `optional` in config.yaml would hide a wrong name
    compose_config([f"dataset={dataset}", f"task={task}", *NEEDED.get(dataset, [])])


def test_every_task_has_an_option_of_its_name():
    assert set(TASKS.known()) == set(options("task"))


def test_pipeline_is_the_default_and_full_size_uses_the_same_stages():
    demo, full = compose_config([]), compose_config(["task=pipeline", "model=opt2.7b", "dataset=coco_vg"])
    assert demo.task.kind == "pipeline" and demo.model.name == "tiny_opt" and demo.dataset.name == "digits"
    assert [stage.task for stage in full.task.stages] == [stage.task for stage in demo.task.stages]


def test_recipe_gives_way_to_the_command_line():
    assert compose_config(["task=caption", "dataset=coco"]).optim.warmup_steps == 1000
    assert compose_config(["task=caption", "dataset=coco", "optim.warmup_steps=7"]).optim.warmup_steps == 7
