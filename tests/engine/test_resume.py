"""Whether a folder has the run that a command would go on with."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from blip2x.engine.resume import may_go_on
from blip2x.errors import UserError

CONFIG = {
    "task": {"kind": "x", "max_steps": 3, "log_every": 1, "overrides": ["optim.lr=1", "logger=wandb"]},
    "optim": {"lr": 1.0},
    "parallelism": {"dp": 1},
    "run_name": "r",
    "resume": "never",
    "dataset": {"num_workers": 0, "name": "d", "images": "data/coco/images"},
    "paths": {"data": "data", "outputs": "."},
}


def config(**changes):
    return OmegaConf.merge(OmegaConf.create(CONFIG), OmegaConf.create(changes))


@pytest.fixture
def folder(tmp_path):
    OmegaConf.save(config(), tmp_path / "config.yaml")
    return tmp_path


def test_where_nothing_is_nothing_goes_on(tmp_path):
    assert not may_go_on(tmp_path / "new", config())


def test_a_run_killed_at_birth_is_cleared_away(tmp_path):
    (tmp_path / "r").mkdir()
    for name in ("command.txt", "overrides.yaml", "hardware.json", "diff.patch", ".config.yaml.partial"):
        (tmp_path / "r" / name).touch()
    assert not may_go_on(tmp_path / "r", config()) and not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["thesis.tex", "diff.patch"])
def test_a_folder_of_others_is_kept(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"has no config\.yaml, so it is no run of blip2x"):
        may_go_on(tmp_path, config())
    assert (tmp_path / name).exists()


def test_what_changes_no_result_may_be_another(folder):
    task = {"log_every": 9, "patch_dtype": "float16", "overrides": ["optim.lr=1", "parallelism=dp", "resume=auto"]}
    free = {"parallelism": {"dp": 4, "tp": 2}, "resume": "auto", "dataset": {"num_workers": 8}, "task": task}
    assert may_go_on(folder, config(**free))


def test_keys_that_came_later_do_not_stop_an_older_run(folder):
    assert may_go_on(folder, config(run=None, runs=None, sweep="lr", quiet=True))
    with pytest.raises(UserError, match="runs was not there, is outputs"):
        may_go_on(folder, config(runs="outputs"))


def test_the_data_may_have_moved_and_not_within_their_folder(folder):
    moved = {"paths": {"data": "/disk/data"}, "dataset": {"images": "/disk/data/coco/images"}}
    assert may_go_on(folder, config(**moved))
    moved["dataset"]["images"] = "/disk/data/other"
    with pytest.raises(UserError, match=r"dataset.images was paths.data/coco/images, is paths.data/other"):
        may_go_on(folder, config(**moved))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"optim": {"lr": 2.0}}, "optim.lr was 1.0, is 2.0"),
        ({"task": {"max_steps": 4}}, "task.max_steps was 3, is 4"),
        ({"task": {"overrides": ["optim.lr=2"]}}, "task.overrides was"),
        ({"task": {"new": 1}}, "task.new was not there, is 1"),
        ({"dataset": {"name": "e"}}, "dataset.name was d, is e"),
    ],
)
def test_what_changes_results_is_named(folder, changes, sentence):
    with pytest.raises(UserError, match=f"is of a run with other settings: {sentence}"):
        may_go_on(folder, config(**changes))


def test_a_config_that_cannot_be_read_is_named(folder):
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        may_go_on(folder, config())
