"""Where weights are: names, paths, what a checkpoint brings, and what it remembers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from blip2x.config.compose import compose_config
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.weights.describe import follow_source
from blip2x.models.weights.source import open_source
from blip2x.tasks.common.weights import (
    CLIP_NORMALISATION,
    STAGE2,
    Start,
    Weights,
    normalisation,
    require_trainable,
    source_normalisation,
)


@pytest.fixture
def weights(small):
    """`weights(folder or None, *overrides)`."""

    def make(whole, *overrides):
        cfg = compose_config(["task=caption", *small, *overrides])
        return Weights(cfg.model, cfg.paths, None if whole is None else str(whole))

    return make


def test_a_name_is_a_path_or_a_folder_below_the_root(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights/eye").mkdir(parents=True)
    assert weights(None).locate("eye", "k") == Path("weights/eye")
    (tmp_path / "eye").mkdir()
    assert weights(None).locate("eye", "k") == Path("eye")
    sentence = r"^model.vision.weights=eyo: there is no eyo and no weights/eyo, and nothing that is published has that name"
    with pytest.raises(UserError, match=sentence):
        weights(None).locate("eyo", "model.vision.weights")


def test_what_has_a_published_name_is_not_fetched_offline(weights, tmp_path):
    sentence = rf"^model.weights=blip2_pretrained.pth: there is no {tmp_path}/blip2_pretrained.pth, and nothing may be fetched"
    with pytest.raises(UserError, match=sentence):
        weights("blip2_pretrained.pth", f"paths.weights={tmp_path}", "paths.offline=true")


PARITY = Path(__file__).resolve().parents[2] / "parity"
# the language models of tests/parity/language, as far as a config of ours can differ
OPT = [*(f"model.language.{key}" for key in ("width=24", "depth=2", "num_heads=3", "mlp_width=40", "max_positions=32"))]
T5 = {"width": 20, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4, "head_width": 6, "mlp_width": 36}
T5 = [f"model.language.{key}={value}" for key, value in {**T5, "relative_buckets": 8, "relative_max_distance": 12}.items()]


def test_files_of_other_systems_bring_what_they_hold(weights):
    found = weights(PARITY / "lavis/stage1.pth")
    assert found.brings("vision") and found.brings("qformer") and not found.brings("language")
    assert found.folder("vision") == PARITY / "lavis/stage1.pth" and found.folder("language") is None
    found = weights(PARITY / "huggingface/opt", "model.vision.weights=/not/looked/at")
    assert all(found.brings(part) for part in ("vision", "qformer", "language"))
    assert not weights(None).brings("vision") and weights(None).source is None


def test_a_source_is_opened_once_until_it_changes(weights, trained, tmp_path):
    shutil.copytree(trained / "pretrain_stage1/checkpoint", tmp_path / "c")
    found = weights(tmp_path / "c")
    assert found.source is found.source and weights(tmp_path / "c").source is found.source
    before, manifest = found.source, tmp_path / "c/manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 1', '"step": 9'))
    os.utime(manifest, (0, 1))
    assert found.source is not before and found.source.manifest["step"] == 9


def test_weights_of_another_part_are_told(weights):
    language, vision = f"{PARITY}/language/opt", f"{PARITY}/lavis/clip_vit_L.pth"
    with pytest.raises(UserError, match=rf"^model.vision.weights={language} holds a language model, but nothing of the visi"):
        weights(None, f"model.vision.weights={language}").part("vision")
    with pytest.raises(UserError, match=rf"^model.qformer.weights={vision} holds an image encoder, but nothing of the qfor"):
        weights(None, f"model.qformer.weights={vision}").part("qformer")


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("opt", ["model.language.num_heads=6"], "model.language.num_heads is 6, but 3 there"),
        ("opt", ["model.language.depth=3"], "model.language.depth is 3, but 2 there"),
        ("opt", ["model.language.width=30"], "model.language.width is 30, but 24 there"),
        ("opt", ["model.language.vocab_size=42"], "model.language.vocab_size is 42, but 41 there"),
        ("t5", ["model.language.num_heads=5"], "model.language.num_heads is 5, but 4 there"),
        ("t5", ["model.language.relative_max_distance=128"], "model.language.relative_max_distance is 128, but 12 there"),
        ("t5", ["model.language.decoder_depth=1"], "model.language.decoder_depth is 1, but 2 there"),
    ],
)
def test_a_part_of_another_shape_is_refused_with_both_values(weights, name, overrides, sentence):
    """Also what no tensor's shape tells, but its config.json."""
    given = [f"model=tiny_{name}", f"model.language.weights={PARITY}/language/{name}", *(OPT if name == "opt" else T5)]

    def part(*more):
        cfg = compose_config(["task=pretrain_vision", *given, *more])
        return Weights(cfg.model, cfg.paths, None).part("language")

    assert part().what == "a language model"
    with pytest.raises(UserError, match=rf"^model=tiny_{name} does not fit the language weights of \S+: {sentence}; choose"):
        part(*overrides)


@pytest.mark.parametrize("name", ["lavis/eva_vit_g.pth", "lavis/stage1.pth"])
def test_all_sources_of_a_model(weights, name):
    """The whole model's with all it has, and of others only the part that is asked for, and as many blocks as BLIP-2 reads."""
    eye = ["width=16", "mlp_width=26", "image_size=12", "patch_size=4", "num_heads=2", "depth=1"]
    given = [*(f"model.vision.{key}" for key in eye), f"model.vision.weights={PARITY / name}"]
    found = weights(None, *given)
    if "stage1" in name:
        with pytest.raises(UserError, match=r"model.vision.depth is 1, but 2 there"):  # nothing to leave out of a whole BLIP-2
            list(found.sources(["vision"]))
        return
    ((source, tensors),) = found.sources(["vision", "language"])
    assert source.family == "EVA ViT" and {name.split(".")[2] for name in tensors if ".blocks." in name} == {"0"}
    whole = weights(PARITY / "lavis/stage2_opt.pth", *given)
    (first, all_of_it), (second, _) = whole.sources(["vision"])
    assert first.what == "stage 2" and all_of_it.keys() == first.tensors.keys() and second is source


def test_a_model_of_another_shape_than_its_checkpoint_is_refused(weights, trained):
    whole = trained / "pretrain_stage2/checkpoint"
    weights(whole).require_same_shape()
    weights(None).require_same_shape()
    with pytest.raises(UserError, match=r"is not the model of .*: model.qformer.width is 32, but 24 there; .* or model=auto$"):
        weights(whole, "model.qformer.width=32").require_same_shape()
    with pytest.raises(UserError, match=r"model.vision.num_heads is 2, but 4 there"):  # of the frozen part, as recorded
        weights(whole, "model.vision.num_heads=2").require_same_shape()


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
    with pytest.raises(
        UserError, match=r"lavis/stage1.pth is a checkpoint of stage 1 \(LAVIS\), but task=caption needs one of pretr"
    ):
        weights(PARITY / "lavis/stage1.pth").require(STAGE2, "caption")
    weights(PARITY / "huggingface/opt").require(STAGE2, "caption")
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


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, CLIP_NORMALISATION),
        ({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}, {"mean": [0.5] * 3, "std": [0.25] * 3}),
        ({"do_normalize": True}, CLIP_NORMALISATION),
    ],
)
def test_other_systems_weights_were_trained_on_what_their_settings_say_or_as_clip(tmp_path, config, expected):
    folder = shutil.copytree(PARITY / "huggingface/opt", tmp_path / "opt")
    if config:
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
    assert source_normalisation(open_source(folder)) == expected
    assert source_normalisation(open_source(PARITY / "lavis/stage1.pth")) == CLIP_NORMALISATION


def test_an_own_checkpoint_says_it_itself(trained, tmp_path, small):
    recorded = normalisation(compose_config([]).dataset)
    assert source_normalisation(open_source(trained / "pretrain_stage1/checkpoint")) == recorded
    model = build_stage1(follow_source(compose_config(small).model, None), vocab_size=9)
    assert source_normalisation(open_source(save_checkpoint(tmp_path / "c", model, kind="k", step=1))) is None


def test_a_frozen_part_needs_weights():
    cfg = compose_config(["task=caption", "model.vision.frozen=false"]).model
    require_trainable(cfg, "vision")
    with pytest.raises(UserError, match=r"^model.language.frozen=true, but nothing says where .* set model.language.weights"):
        require_trainable(cfg, "language")
    require_trainable(cfg, "qformer")  # which is never frozen
