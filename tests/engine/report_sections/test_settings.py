"""A run's config beside the defaults of this version, or the reason why they cannot be compared."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

import blip2x
from blip2x.config.compose import compose_dict
from blip2x.engine.report_sections.settings import changed_settings
from blip2x.engine.run_files import RunFiles


def changed(tmp_path, *overrides: str, versions: dict | None = None, edit=lambda config: None):
    """Settings of a run whose config.yaml is what the command of `overrides` writes, changed by `edit`."""
    config = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(compose_dict([*overrides]), resolve=True)))
    edit(config)
    return changed_settings(RunFiles(tmp_path, config=config, versions=versions or {}))


def told(found) -> list[tuple[str, str, str]]:
    return [(setting.key, setting.default, setting.own) for setting in found.changed]


def test_only_what_differs_is_told_with_its_default(tmp_path):
    found = changed(tmp_path, "seed=7", "model.qformer.num_queries=16", "dataset.colours=[red,green]", "run_name=mine")
    assert found.base == "python runners/run.py task=pipeline model=tiny_opt dataset=digits"
    assert told(found) == [
        ("model.qformer.num_queries", "8", "16"),
        ("dataset.colours", '["red", "green", "blue", "yellow", "white", "purple"]', '["red", "green"]'),
        ("seed", "42", "7"),
    ]


def test_a_command_of_names_alone_differs_in_nothing(tmp_path):
    found = changed(tmp_path, "task=caption", "model=opt2.7b", "dataset=coco", "model.weights=null", "paths.data=/elsewhere")
    assert "task=caption model=opt2.7b dataset=coco" in found.base
    assert (found.problem, told(found)) == ("", [])  # the paths of its files are where this run's data are


def test_another_option_of_a_group_shows_the_keys_that_only_it_has(tmp_path):
    found = told(changed(tmp_path, "task=pretrain_stage1", "parallelism=dp", "precision=bf16"))
    assert ("parallelism.kind", "single", "hybrid") in found and ("precision.name", "fp32", "bf16") in found
    assert any(default == "\u2013" for _, default, _ in found)


def test_what_the_user_must_give_has_no_default(tmp_path):
    found = told(changed(tmp_path, "task=extract_features", "task.mode=image", "dataset=custom", "dataset.images=photos"))
    assert ("dataset.images", "to be given", "photos") in found


def test_experiments_are_told_by_what_they_set(tmp_path):
    found = changed(tmp_path, "experiment=digits_t5")
    assert "model=tiny_t5" in found.base and not found.problem


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda config: config.pop("seed"), "other keys at the top"),
        (lambda config: config["optim"].update(momentum=0.9), "other keys in optim"),
        (lambda config: config["model"].update(name="opt1.3b"), "cannot compose task=pipeline model=opt1.3b dataset=digits"),
        (lambda config: config["dataset"].pop("name"), "does not name a task, a model and a data set"),
        (lambda config: config.update(task="caption"), "does not name"),
    ],
)
def test_a_config_of_another_version_cannot_be_compared(tmp_path, edit, why):
    found = changed(tmp_path, "seed=7", edit=edit)
    assert why in found.problem and found.changed == []


def test_a_run_by_another_version_cannot_be_compared(tmp_path):
    found = changed(tmp_path, "seed=7", versions={"blip2x": "0.0.1"})
    assert found.problem == f"the run was made by blip2x 0.0.1, this page by {blip2x.__version__}"
    assert told(changed(tmp_path, "seed=7", versions={"blip2x": blip2x.__version__})) == [("seed", "42", "7")]
