"""``model=auto``: the model that the weights are of; what is typed wins, and what nothing says is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blip2x.config.auto import auto_defaults, auto_model, typed
from blip2x.config.compose import compose_config, compose_dict
from blip2x.config.model import Activation, ClipVitConfig, EvaVitConfig, Missing, ModelConfig, OptConfig, T5Config
from blip2x.errors import UserError

PARITY = Path(__file__).resolve().parents[1] / "parity"
HEADS = ["model.vision.num_heads=2", "model.qformer.num_heads=3"]  # which LAVIS's files do not say


def auto(weights: str, *overrides: str) -> ModelConfig:
    return compose_config(["model=auto", "task=pretrain_stage2", f"model.weights={PARITY / weights}", *overrides]).model


def test_a_hugging_face_folder_says_all():
    model = auto("huggingface/t5")
    assert model.name == "auto" and model.weights == str(PARITY / "huggingface/t5")
    vision, qformer, language = model.vision, model.qformer, model.language
    assert isinstance(vision, EvaVitConfig) and (vision.kind, vision.num_heads, vision.key_bias) == ("eva_vit", 2, True)
    assert (vision.width, vision.depth, vision.mlp_width, vision.patch_size, vision.image_size) == (16, 2, 26, 5, 15)
    assert (qformer.num_queries, qformer.width, qformer.depth, qformer.num_heads, qformer.mlp_width) == (5, 18, 3, 3, 34)
    assert isinstance(language, T5Config) and language.activation is Activation.gelu_tanh
    assert (language.width, language.encoder_depth, language.decoder_depth, language.num_heads) == (14, 2, 3, 4)
    assert model.ln_vision_eps is None  # follows the weights when they are read
    assert [part.weights for part in (vision, qformer, language)] == [None] * 3  # all in the folder
    assert vision.frozen and language.frozen  # as in every published recipe


def test_what_is_typed_wins():
    parts = ["vision.image_size=30", "vision.frozen=false", "vision.num_heads=4", "language.dropout=0.3"]
    model = auto("huggingface/t5", *(f"model.{value}" for value in (*parts, "temperature=0.1", "ln_vision_eps=1e-3")))
    assert (model.vision.image_size, model.vision.frozen, model.vision.num_heads) == (30, False, 4)
    assert (model.language.dropout, model.temperature, model.ln_vision_eps) == (0.3, 0.1, 1e-3)
    assert (model.vision.width, model.language.width) == (16, 14)


def test_other_groups_and_their_checks_stay():
    config = compose_config(["model=auto", "task=caption", f"model.weights={PARITY}/huggingface/opt", "task.max_new_tokens=5"])
    assert config.task.max_new_tokens == 5 and config.model.language.max_positions == 24
    with pytest.raises(UserError, match=r"task\.max_new_tokens=30 and 5 queries make more than model\.language\.max_positions"):
        compose_config(["model=auto", "task=caption", f"model.weights={PARITY}/huggingface/opt"])


@pytest.mark.parametrize("overrides", [[], ["model.weights=null"], ["model.vision.width=16"]])
def test_without_weights_it_is_one_sentence(overrides):
    with pytest.raises(
        UserError, match=r"^model=auto takes its shape from weights; set model\.weights, or choose another model$"
    ):
        compose_config(["model=auto", *overrides])


def test_weights_that_are_not_there_are_told_with_their_key():
    with pytest.raises(UserError, match=r"^model\.weights=/no/such: there is no /no/such"):
        compose_config(["model=auto", "model.weights=/no/such"])
    given = [f"model.weights={PARITY}/lavis/stage2_opt.pth", *HEADS]
    for part in ("vision", "language"):
        with pytest.raises(UserError, match=rf"^model\.{part}\.weights=/no/such: there is no /no/such"):
            compose_config(["model=auto", *given, f"model.{part}.weights=/no/such"])


def test_nothing_is_fetched_offline(tmp_path):
    with pytest.raises(
        UserError, match=rf"^model\.weights=blip2_pretrained\.pth: there is no {tmp_path}/blip2_pretrained\.pth, a"
    ):
        compose_config(["model=auto", "model.weights=blip2_pretrained.pth", f"paths.weights={tmp_path}", "paths.offline=true"])


def test_heads_that_no_file_says_are_asked_for():
    with pytest.raises(
        UserError, match=r"how many heads its vision part of width 16 has; say it with model\.vision\.num_heads"
    ):
        auto("lavis/stage1.pth")
    with pytest.raises(UserError, match=r"its qformer part of width 18 has; say it with model\.qformer\.num_heads$"):
        auto("lavis/stage1.pth", HEADS[0])
    model = auto("lavis/stage1.pth", *HEADS)
    assert (model.vision.num_heads, model.qformer.num_heads) == (2, 3)


def test_parts_that_the_file_has_not_are_asked_for_and_described_by_their_own():
    with pytest.raises(
        UserError, match=r"do not hold the vision part, and no published one has width 16; .* model\.vision\.weigh"
    ):
        auto("lavis/stage2_opt.pth", *HEADS)
    vision = f"model.vision.weights={PARITY}/lavis/clip_vit_L.pth"
    with pytest.raises(UserError, match=r"the language part, and no published one has width 24; .* model\.language\.weights$"):
        auto("lavis/stage2_opt.pth", *HEADS, vision)
    language = f"model.language.weights={PARITY}/language/opt"
    model = auto("lavis/stage2_opt.pth", *HEADS, vision, language)
    assert isinstance(model.vision, ClipVitConfig) and (model.vision.depth, model.vision.mlp_width) == (2, 64)
    assert isinstance(model.language, OptConfig) and (model.language.depth, model.language.num_heads) == (2, 3)
    assert model.vision.weights == str(PARITY / "lavis/clip_vit_L.pth") and model.language.weights == str(
        PARITY / "language/opt"
    )


def test_a_key_that_is_none_or_a_wrong_type_is_refused():
    for wrong in ("model.vision.colour=red", "model.vision.width=wide", "model.colour=red"):
        with pytest.raises(UserError, match=wrong):
            auto("huggingface/t5", wrong)


# the settings alone

GIVEN = {**auto_defaults(), "weights": "w"}


def no_guess(settings, part):
    raise AssertionError(f"asked for {part}'s heads")


def test_only_what_is_set_is_given():
    group = compose_dict(["model=auto", "model.weights=w", "model.vision.image_size=30"]).model
    assert typed(group) == {**GIVEN, "missing": Missing.error, "vision.image_size": 30}


@pytest.mark.parametrize(
    ("described", "vision", "language"),
    [
        ({"vision.width": 1408, "language.kind": "opt", "language.width": 2560}, "eva_vit_g", "opt2.7b"),
        ({"vision.width": 1408, "language.kind": "opt", "language.width": 4096}, "eva_vit_g", "opt6.7b"),
        ({"vision.width": 1024, "language.kind": "t5", "language.width": 2048}, "clip_vit_l", "flant5xl"),
        ({"vision.width": 1408, "language.kind": "t5", "language.width": 4096}, "eva_vit_g", "flant5xxl"),
    ],
)
def test_parts_of_published_widths_are_those(described, vision, language):
    """As a LAVIS file of stage 2 says it, which holds neither."""
    model = auto_model(GIVEN, described, no_guess)
    published = compose_dict([f"model={language}{'_vitl' if vision == 'clip_vit_l' else ''}"]).model
    assert model.vision == published.vision and model.language == published.language and model.qformer == published.qformer


def test_a_part_that_is_brought_keeps_what_is_described():
    described = {
        "vision.width": 1408,
        "vision.kind": "eva_vit",
        "vision.depth": 12,
        "vision.mlp_width": 99,
        "vision.num_heads": 8,
    }
    model = auto_model(GIVEN, described, lambda settings, part: 7)
    assert (model.vision.depth, model.vision.mlp_width, model.vision.num_heads, model.vision.weights) == (12, 99, 8, None)
    del described["vision.num_heads"]
    assert auto_model(GIVEN, described, lambda settings, part: 7).vision.num_heads == 7
    assert auto_model({**GIVEN, "vision.num_heads": 4}, described, no_guess).vision.num_heads == 4
    assert auto_model({**GIVEN, "vision.weights": "x"}, described, lambda settings, part: 7).vision.weights == "x"


def test_a_key_that_the_part_has_not_is_named():
    described = {"vision.width": 1408, "language.kind": "t5", "language.width": 2048}
    with pytest.raises(UserError, match=r"^model=auto, key \S*max_positions: "):
        auto_model({**GIVEN, "language.max_positions": 5}, described, no_guess)
    with pytest.raises(UserError, match=r"^model=auto, key \S*colour: "):
        auto_model({**GIVEN, "colour": "red"}, described, no_guess)


def test_it_is_a_group_like_every_other():
    described = {"vision.width": 1408, "language.kind": "opt", "language.width": 2560}
    assert isinstance(OmegaConf.to_object(auto_model(GIVEN, described, no_guess)), ModelConfig)
