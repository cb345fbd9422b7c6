"""Where weights are: names, paths, what a checkpoint brings, and what it remembers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from blip2x.config.compose import compose_config
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.tasks.common.weights import STAGE2, Start, Weights, require_trainable, weights_folder


@pytest.fixture
def weights(small):
    """`weights(folder or None, *overrides)`."""

    def make(whole, *overrides):
        return Weights(compose_config(["task=caption", *small, *overrides]), None if whole is None else str(whole))

    return make


def test_a_name_is_a_path_or_a_folder_below_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights/eva").mkdir(parents=True)
    assert weights_folder("eva", "weights", "k") == Path("weights/eva")
    (tmp_path / "eva").mkdir()
    assert weights_folder("eva", "weights", "k") == Path("eva")
    with pytest.raises(UserError, match=r"^model.vision.weights=evo: no folder evo and none at weights/evo; put the weights"):
        weights_folder("evo", "weights", "model.vision.weights")


def test_without_a_checkpoint_parts_are_where_the_config_says(weights, trained, tmp_path):
    assert weights(None).folder("vision") is None and not weights(None).brings("vision")
    assert weights(None, f"model.vision.weights={tmp_path}").folder("vision") == tmp_path
    with pytest.raises(UserError, match=r"^model.language.weights=/no: "):
        weights(None, "model.language.weights=/no").folder("language")
    with pytest.raises(UserError, match=r"^model.weights=/no: "):
        weights("/no")


def test_parts_are_where_the_checkpoint_remembers_unless_the_config_says_otherwise(weights, trained, tmp_path):
    whole = trained / "pretrain_stage2/checkpoint"
    assert weights(whole).folder("language") == trained / "pretrain_language/checkpoint"
    assert weights(whole, f"model.language.weights={tmp_path}").folder("language") == tmp_path
    assert weights(trained / "pretrain_stage1/checkpoint").folder("language") is None  # stage 1 had none


def test_a_copy_of_a_run_folder_prefers_the_parts_that_it_remembers_and_then_its_own(weights, trained, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    whole = copy / "pretrain_stage2/checkpoint"
    assert weights(whole).folder("vision") == trained / "pretrain_vision/checkpoint"
    manifest = whole / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(trained), "/gone"))
    assert weights(whole).folder("vision") == copy / "pretrain_vision/checkpoint"
    monkeypatch.chdir(whole.parent)
    assert weights("checkpoint").folder("vision") == copy / "pretrain_vision/checkpoint"
    shutil.rmtree(copy / "pretrain_vision")
    with pytest.raises(UserError, match=r"vision weights of /gone/pretrain_vision/checkpoint, .*; set model.vision.weights"):
        weights(whole).folder("vision")


def test_what_was_trained_in_the_checkpoint_is_taken_from_there(weights, small, tmp_path):
    model = build_stage1(compose_config(small).model, vocab_size=9)
    save_checkpoint(tmp_path / "c", model, kind="pretrain_stage1", step=1)
    found = weights(tmp_path / "c", "model.vision.weights=/not/looked/at")
    assert found.brings("vision") and found.folder("vision") == tmp_path / "c" and not found.brings("language")


def test_what_a_task_needs_is_there_or_named(weights, trained):
    with pytest.raises(
        UserError, match=r"^task=caption needs a trained model: set model.weights to a checkpoint of pretrain_stage2"
    ):
        weights(None).require(STAGE2, "caption")
    with pytest.raises(UserError, match="is a checkpoint of pretrain_stage1, but task=caption needs one of pretrain_stage2"):
        weights(trained / "pretrain_stage1/checkpoint").require(STAGE2, "caption")
    with pytest.raises(UserError, match="is a checkpoint of pretrain_language, but"):
        weights(trained / "pretrain_language/checkpoint").require(Start("qformer.", "x"), "t")
    weights(trained / "pretrain_stage2/checkpoint").require(STAGE2, "caption")
    weights(trained / "pretrain_stage1/checkpoint").require(Start("qformer.", "x"), "pretrain_stage2")


def test_pictures_must_be_normalised_as_in_training_for_a_frozen_encoder(weights, trained):
    found, other = weights(trained / "pretrain_stage2/checkpoint"), compose_config(["dataset=coco"]).dataset
    found.check_pictures(compose_config([]).dataset)
    with pytest.raises(
        UserError, match=r"mean=\[0.5, 0.5, 0.5\] .* but dataset=coco has mean=\[0.48.*set dataset.transform.mean"
    ):
        found.check_pictures(other)
    weights(trained / "pretrain_stage2/checkpoint", "model.vision.frozen=false").check_pictures(other)
    weights(None).check_pictures(other)


def test_a_frozen_part_needs_weights():
    cfg = compose_config(["task=caption", "model.vision.frozen=false"]).model
    require_trainable(cfg, "vision")
    with pytest.raises(UserError, match=r"^model.language.frozen=true, but nothing says where .* set model.language.weights"):
        require_trainable(cfg, "language")
