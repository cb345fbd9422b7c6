"""A config composed inside the program is the one of the command line, and every value survives being typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from blip2x.config.compose import CONF_FOLDER, compose_config, compose_dict, inner_overrides, quoted
from blip2x.config.task import CaptionConfig
from blip2x.errors import UserError


def test_config_is_typed():
    task = compose_config(["task=caption", "task.num_beams=3"]).task
    assert isinstance(task, CaptionConfig) and task.num_beams == 3


def test_mistake_names_the_overrides_and_the_reason():
    with pytest.raises(UserError, match=r"^seed=1 modle=x: .*modle") as caught:
        compose_dict(["seed=1", "modle=x"])
    assert "\n" not in str(caught.value)


def test_composing_works_inside_a_running_hydra_and_leaves_it_running():
    with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        assert compose_dict(["seed=7"]).seed == 7
        assert compose("config", overrides=["seed=8"]).seed == 8


def test_a_pipeline_keeps_what_it_was_composed_from():
    assert compose_config(["seed=7"]).task.overrides == ["seed=7"]
    assert compose_config(["seed=7", "task.overrides=['seed=8']"]).task.overrides == ["seed=8"]


def test_what_belongs_to_the_run_itself_is_not_for_the_tasks_inside_it():
    words = [
        "task=pipeline",
        "+task.overrides=[]",
        "run_name=r",
        "overwrite=true",
        "resume=auto",
        "optim=adamw",
        "dataset.name=task",
    ]
    assert inner_overrides(words) == ["optim=adamw", "dataset.name=task"]


def test_overrides_of_the_command_that_hydra_started(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import hydra\n"
        "from blip2x.config.compose import CONF_FOLDER, command_overrides, compose_dict\n"
        "@hydra.main(version_base='1.3', config_path=str(CONF_FOLDER), config_name='config')\n"
        "def main(cfg): print(command_overrides(), compose_dict(command_overrides()).seed)\n"
        "main()\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(script), "seed=5", "run_name='a b'"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == """['seed=5', "run_name='a b'"] 5""", done.stderr


@pytest.mark.parametrize(
    "value",
    [
        *("/a b/c", "it's=1,2", "[1]", "{a: 1}", "null", "3", "", "~/x", "$HOME", "two\nlines", "é"),
        *("back\\slash", "two\\\\slashes", "end\\", "\\", "it\\'s", "${x}", "\\${x}", "\\\\${x}", "${x", "'${x}'\\"),
    ],
)
def test_quoted_values_reach_the_config_unchanged(value):
    assert compose_dict([f"run_name={quoted(value)}"]).run_name == value
