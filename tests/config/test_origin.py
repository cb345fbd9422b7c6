"""Who set a value: of real compositions, each kind of source once."""

from __future__ import annotations

import pytest

from blip2x.config.compose import compose_config
from blip2x.config.origin import COMMAND_LINE, PROGRAM, SCHEMA, flat, options, origins


def of(*words, givers=None, change=None):
    cfg = compose_config(list(words))
    if change:
        change(cfg)
    return origins(cfg, list(words), givers or {})


def _deepen(cfg):
    """As model=auto does when the weights say it."""
    cfg.model.vision.depth = 77


@pytest.fixture(scope="module")
def experiment():
    """A published setting, two values of it overruled and one filled in."""
    return of("experiment=caption_coco_ft_opt2.7b", "model.vision.image_size=224", "task.batch_size=2", change=_deepen)


@pytest.fixture(scope="module")
def stage1():
    """(Config, origins) of many words, of which the fifth is a pipeline's."""
    words = ["task=pretrain_stage1", "task.validation={max_images: 7}", "task.validation.num_beams=2", "seed=1", "seed=2"]
    cfg = compose_config(words)
    return cfg, origins(cfg, words, {4: "a stage"})


def test_every_leaf_has_an_origin(stage1):
    cfg, found = stage1
    assert list(found) == list(flat(cfg))


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("task.batch_size", COMMAND_LINE),
        ("model.vision.image_size", COMMAND_LINE),
        ("task.train", "conf/experiment/caption_coco_ft_opt2.7b.yaml"),
        ("task.max_epochs", "conf/recipe/coco/caption.yaml"),
        ("optim.lr", "conf/optim/finetune_caption.yaml"),  # which the recipe brings in
        ("task.num_beams", "conf/task/caption.yaml"),
        ("model.language.max_positions", "conf/model/language/opt2.7b.yaml"),
        ("seed", "conf/config.yaml"),
        ("task.kind", SCHEMA),
    ],
)
def test_the_last_one_who_set_it_is_named(experiment, key, source):
    assert experiment[key].source == source


def test_who_was_overruled(experiment):
    size, lr = experiment["model.vision.image_size"], experiment["optim.lr"]
    assert size.before.startswith("conf/experiment/") and not size.is_default
    assert experiment["optim.beta1"].is_default and lr.source == "conf/optim/finetune_caption.yaml"  # 1e-5, a text to YAML


def test_of_two_overrides_the_last_one_counts_and_others_may_have_given_it(stage1):
    _, found = stage1
    assert (found["seed"].source, found["seed"].before) == ("a stage", COMMAND_LINE)


def test_a_whole_group_of_values_can_be_given_at_once(stage1):
    _, found = stage1
    sources = {key: found[f"task.validation.{key}"].source for key in ("max_images", "num_beams", "min_new_tokens")}
    recipe = "conf/recipe/digits/pretrain_stage1.yaml"
    assert sources == {"max_images": COMMAND_LINE, "num_beams": COMMAND_LINE, "min_new_tokens": recipe}


def test_variables_of_the_environment_are_named(monkeypatch):
    monkeypatch.setenv("BLIP2X_DATA", "elsewhere")
    found = of("task=caption")
    assert found["paths.data"].source == "the environment, BLIP2X_DATA" and not found["paths.data"].is_default
    assert found["paths.weights"].source == "conf/paths/default.yaml"


def test_what_composing_did_not_give_is_the_programs(experiment):
    assert experiment["model.vision.depth"].source == PROGRAM
    assert experiment["model.vision.depth"].before == "conf/model/vision/eva_vit_g.yaml"


def test_options_are_those_that_were_chosen():
    found = options(["experiment=caption_coco_ft_opt2.7b", "precision=bf16"])
    assert {found[group] for group in ("task", "model", "precision")} == {"caption", "opt2.7b", "bf16"}
    assert "logger" in found and not any(group.startswith("hydra") for group in found)
