"""What weights say of their model, and whether a config is of the same one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import save_file

from blip2x.config.auto import PARTS
from blip2x.config.compose import compose_config
from blip2x.config.model import Activation, ModelConfig
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze
from blip2x.models.weights.describe import describe, follow_source, guessed_heads, require_same_shape, settings_of
from blip2x.models.weights.source import Source, open_source
from blip2x.models.weights.stored import StoredTensor

PARITY = Path(__file__).resolve().parents[2] / "parity"

VISION = {"kind": "eva_vit", "width": 16, "depth": 2, "mlp_width": 26}
LAVIS_VISION = {**VISION, "image_size": 12, "patch_size": 4, "key_bias": False}
HF_VISION = {**VISION, "image_size": 15, "patch_size": 5, "key_bias": True, "num_heads": 2}
QFORMER = {"num_queries": 5, "width": 18, "depth": 3, "mlp_width": 30, "cross_attention_every": 2}
HF_QFORMER = {**QFORMER, "mlp_width": 34, "num_heads": 3}
OPT = {"kind": "opt", "width": 24, "depth": 2, "mlp_width": 40, "vocab_size": 41, "max_positions": 32}
HF_OPT = {"kind": "opt", "width": 15, "depth": 2, "mlp_width": 28, "vocab_size": 41, "max_positions": 24, "num_heads": 3}
T5 = {"kind": "t5", "width": 20, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4, "head_width": 6, "mlp_width": 36}
T5 |= {"vocab_size": 41, "relative_buckets": 8, "relative_max_distance": 12}
HF_T5 = {**T5, "width": 14, "decoder_depth": 3, "head_width": 5, "mlp_width": 24, "vocab_size": 43, "activation": "gelu_tanh"}


def keys(**groups: Any) -> dict[str, Any]:
    """Dotted keys of a group's values; what is no group stays."""
    return {
        f"{group}.{key}" if isinstance(values, dict) else group: value
        for group, values in groups.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    }


SAYS = {
    "lavis/stage1.pth": keys(
        vision=LAVIS_VISION, qformer={**QFORMER, "vocab_size": 37, "max_positions": 11, "embed_dim": 14}, ln_vision_eps=1e-5
    ),
    "lavis/stage2_opt.pth": keys(
        vision={"width": 16}, qformer=QFORMER, language={"kind": "opt", "width": 24}, ln_vision_eps=1e-5
    ),
    "lavis/stage2_t5.pth": keys(
        vision={"width": 16}, qformer=QFORMER, language={"kind": "t5", "width": 20}, ln_vision_eps=1e-5
    ),
    "lavis/eva_vit_g.pth": keys(vision=LAVIS_VISION),
    "lavis/clip_vit_L.pth": keys(
        vision={"kind": "clip_vit", "width": 16, "depth": 2, "mlp_width": 64, "image_size": 12, "patch_size": 4}
    ),
    "paddlemix/stage1": keys(
        vision=LAVIS_VISION, qformer={**QFORMER, "vocab_size": 37, "max_positions": 11, "embed_dim": 14}, ln_vision_eps=1e-5
    ),
    "paddlemix/stage2_opt": keys(vision=LAVIS_VISION, qformer=QFORMER, language=OPT, ln_vision_eps=1e-5),
    "huggingface/opt": keys(vision=HF_VISION, qformer=HF_QFORMER, language=HF_OPT, ln_vision_eps=1e-6),
    "huggingface/t5": keys(vision=HF_VISION, qformer=HF_QFORMER, language=HF_T5, ln_vision_eps=1e-6),
    "huggingface/retrieval": keys(
        vision=HF_VISION, qformer={**HF_QFORMER, "vocab_size": 37, "max_positions": 12, "embed_dim": 11}, ln_vision_eps=1e-6
    ),
    "language/opt": keys(language={**OPT, "num_heads": 3}),
    "language/opt_bfloat16_torch": keys(language={**OPT, "num_heads": 3}),
    "language/t5": keys(language=T5),
}


@pytest.mark.parametrize("name", SAYS)
def test_all_families(name):
    assert describe(open_source(PARITY / name)) == SAYS[name]


@pytest.fixture
def altered(tmp_path):
    """`altered(folder, group, **changes)` -> a copy of the folder with another config.json; ...: left out."""

    def write(name: str, group: str = "", **changes: Any) -> Source:
        folder = tmp_path / "copy"
        shutil.copytree(PARITY / name, folder)
        config = json.loads((folder / "config.json").read_text())
        owner = config[group] if group else config
        for key, value in changes.items():
            if value is ...:
                owner.pop(key)
            else:
                owner[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        return open_source(folder)

    return write


@pytest.mark.parametrize(
    ("name", "group", "changes", "sentence"),
    [
        ("language/opt", "", {"model_type": "gpt2"}, "model_type is 'gpt2', but blip2x's models have 'opt'"),
        ("language/opt", "", {"do_layer_norm_before": False}, "do_layer_norm_before is False, but blip2x's models have True"),
        ("language/opt", "", {"activation_function": "gelu"}, "activation_function is 'gelu', but .* 'relu'"),
        ("language/opt", "", {"enable_bias": False}, "enable_bias is False"),
        ("language/t5", "", {"model_type": "umt5"}, "model_type is 'umt5', but .* 't5'"),
        ("language/t5", "", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu', but blip2x's T5 has a gated one"),
        ("language/t5", "", {"feed_forward_proj": ...}, "feed_forward_proj is None"),
        (
            "language/t5",
            "",
            {"tie_word_embeddings": True},
            "tie_word_embeddings is true, but blip2x's T5 has a head of",
        ),
        ("language/t5", "", {"tie_word_embeddings": ...}, "tie_word_embeddings is true"),
        ("language/t5", "", {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05, but .* 1e-06"),
        ("huggingface/opt", "text_config", {"activation_function": "gelu"}, r"text_config\.activation_function is 'gelu'"),
        ("huggingface/t5", "text_config", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ("huggingface/t5", "text_config", {"tie_word_embeddings": ...}, "tie_word_embeddings is true"),
        ("huggingface/t5", "vision_config", {"hidden_act": "quick_gelu"}, r"vision_config\.hidden_act is 'quick_gelu', but"),
        ("huggingface/t5", "vision_config", {"layer_norm_eps": 1e-5}, r"vision_config\.layer_norm_eps is 1e-05"),
        ("huggingface/opt", "qformer_config", {"hidden_act": "relu"}, r"qformer_config\.hidden_act is 'relu'"),
        (
            "huggingface/opt",
            "qformer_config",
            {"layer_norm_eps": 1e-5},
            r"qformer_config\.layer_norm_eps is 1e-05, .* 1e-12",
        ),
    ],
)
def test_what_our_models_do_not_have_is_refused(altered, name, group, changes, sentence):
    with pytest.raises(UserError, match=rf"copy/config\.json: {sentence}"):
        describe(altered(name, group, **changes))


def test_settings_that_are_not_written_are_the_usual_ones(altered):
    source = altered("language/t5", relative_attention_max_distance=..., layer_norm_epsilon=...)
    assert describe(source) == {**SAYS["language/t5"], "language.relative_max_distance": 128}


@pytest.mark.parametrize(("act", "ours"), [("gelu", "gelu"), ("gelu_new", "gelu_tanh")])
def test_t5s_gelu_is_hugging_faces(altered, act, ours):
    assert describe(altered("huggingface/t5", "text_config", dense_act_fn=act))["language.activation"] == ours


def shapes(family: str, tensors: dict[str, tuple[int, ...]]) -> Source:
    """A source of tensors without numbers."""

    def tensor(name: str) -> StoredTensor:
        return StoredTensor(name, tensors[name], np.dtype("f4"), lambda: np.empty(0))

    return Source(Path("somewhere"), family, {name: tensor(name) for name in tensors}, [])


@pytest.mark.parametrize(
    ("family", "width", "count", "depth"),
    [
        ("EVA ViT", 1408, 40, 39),
        ("EVA ViT", 1408, 39, 39),
        ("CLIP ViT", 1024, 24, 23),
        ("CLIP ViT", 1024, 23, 23),
        ("EVA ViT", 768, 40, 40),
        ("blip2x", 1408, 40, 40),
    ],
)
def test_published_encoders_have_a_block_that_blip2_leaves_out(family, width, count, depth):
    tensors = {f"vision.blocks.{i}.fc1.weight": (width, 4 * width) for i in range(count)}
    tensors |= {"vision.embeddings.projection.weight": (width, 3, 14, 14), "vision.embeddings.positions": (1, 257, width)}
    tensors |= {"vision.embeddings.class_token": (1, 1, width)}
    said = describe(shapes(family, tensors | ({"vision.norm.weight": (width,)} if family == "CLIP ViT" else {})))
    assert said["vision.depth"] == depth and said["vision.image_size"] == 224 and said["vision.mlp_width"] == 4 * width


def test_a_bert_says_the_q_formers_shape_but_not_its_vocabulary(tmp_path):
    """To which [DEC] is added."""
    arrays = {f"bert.encoder.layer.{i}.intermediate.dense.weight": np.zeros((20, 12), "f4") for i in range(2)}
    arrays |= {
        "bert.embeddings.LayerNorm.weight": np.zeros(12, "f4"),
        "bert.embeddings.word_embeddings.weight": np.zeros((9, 12)),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_act": "gelu"}))
    expected = {"qformer.width": 12, "qformer.depth": 2, "qformer.mlp_width": 20, "qformer.num_heads": 2}
    assert describe(open_source(tmp_path)) == expected
    (tmp_path / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"config\.json: hidden_act is 'relu', but blip2x's models have 'gelu'"):
        describe(open_source(tmp_path))


@pytest.mark.parametrize(
    ("name", "missing"),
    [("lavis/eva_vit_g.pth", "vision.embeddings.class_token"), ("language/t5", "language.shared.weight")],
)
def test_a_tensor_without_which_nothing_can_be_said_is_named(name, missing):
    source = open_source(PARITY / name)
    del source.tensors[missing]
    with pytest.raises(UserError, match=rf" lacks {missing} of (the image encoder|T5); copy or download it again"):
        describe(source)


# heads


@pytest.mark.parametrize(
    ("part", "width", "heads"),
    [
        ("vision", 1408, 16),
        ("vision", 1024, 16),
        ("qformer", 768, 12),
        ("language", 2560, 32),
        ("language", 4096, 32),
        ("language", 768, 12),
    ],
)
def test_heads_of_published_widths_are_guessed(part, width, heads):
    assert guessed_heads({f"{part}.width": width}, part) == heads


@pytest.mark.parametrize("part", ["vision", "qformer", "language"])
def test_heads_of_other_widths_are_asked_for(part):
    with pytest.raises(UserError, match=rf"heads its {part} part of width 100 has; say it with model\.{part}\.num_heads"):
        guessed_heads({f"{part}.width": 100}, part)


# the same model as a config's


def config(name: str, **changes: Any) -> ModelConfig:
    """A config that agrees with what a file says."""
    model = "tiny_t5" if SAYS[name].get("language.kind") == "t5" else "tiny_opt"
    cfg = compose_config([f"model={model}"]).model
    for key, value in {**SAYS[name], **changes}.items():
        part, _, field = key.rpartition(".")
        if field != "activation":
            setattr(getattr(cfg, part) if part else cfg, field, value)
    return cfg


@pytest.mark.parametrize("name", [name for name in SAYS if "clip" not in name])
def test_a_config_that_agrees_is_let_through(name):
    require_same_shape(config(name), open_source(PARITY / name))


def test_every_difference_is_named_with_both_values():
    cfg = config("lavis/stage1.pth", **{"vision.width": 32, "qformer.depth": 4})
    with pytest.raises(UserError) as caught:
        require_same_shape(cfg, open_source(PARITY / "lavis/stage1.pth"))
    assert str(caught.value) == (
        f"model=tiny_opt is not the model of {PARITY}/lavis/stage1.pth: model.vision.width is 32, but 16 there; "
        "model.qformer.depth is 4, but 3 there; choose that model, or model=auto"
    )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("lavis/stage1.pth", "vision.image_size", 24),  # positions are interpolated
        ("lavis/stage1.pth", "ln_vision_eps", 1e-6),
        ("lavis/stage1.pth", "qformer.vocab_size", None),  # the tokenizer's
        ("huggingface/opt", "language.vocab_size", 40),  # a token for images is left out
        ("lavis/eva_vit_g.pth", "vision.depth", 1),  # the last block is left out
    ],
)
def test_what_may_differ(name, key, value):
    require_same_shape(config(name, **{key: value}), open_source(PARITY / name))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("huggingface/opt", "language.vocab_size", 42),
        ("lavis/eva_vit_g.pth", "vision.depth", 3),
        ("lavis/stage1.pth", "vision.depth", 1),
        ("lavis/stage1.pth", "vision.kind", "clip_vit"),
        ("lavis/stage1.pth", "vision.key_bias", True),
        ("huggingface/opt", "vision.num_heads", 4),
        ("huggingface/opt", "qformer.num_heads", 2),
        ("huggingface/opt", "language.num_heads", 5),
        ("huggingface/t5", "language.num_heads", 2),
        ("huggingface/t5", "language.head_width", 10),
        ("huggingface/t5", "language.relative_max_distance", 128),
        ("huggingface/t5", "language.decoder_depth", 2),
        ("lavis/stage1.pth", "qformer.cross_attention_every", 1),
        ("lavis/stage1.pth", "qformer.num_queries", 8),
    ],
)
def test_what_may_not_differ(name, key, value):
    with pytest.raises(UserError, match=rf"model\.{key} is {value}, but {SAYS[name][key]} there"):
        require_same_shape(config(name, **{key: value}), open_source(PARITY / name))


def test_of_a_part_only_that_part_counts():
    source = open_source(PARITY / "huggingface/opt")
    cfg = config("huggingface/opt", **{"vision.width": 32, "language.num_heads": 5})
    require_same_shape(cfg, source, "qformer")
    with pytest.raises(UserError) as caught:
        require_same_shape(cfg, source, "language")
    assert str(caught.value) == (
        f"model=tiny_opt does not fit the language weights of {PARITY}/huggingface/opt: model.language.num_heads is 5, "
        "but 3 there; choose the model that fits, or other weights"
    )


def test_where_only_the_first_layer_looks_every_larger_distance_is_the_same():
    tensors = {f"qformer.layers.{i}.query_ffn.fc1.weight": (96, 192) for i in range(2)}
    source = shapes("LAVIS", {**tensors, "qformer.layers.0.cross_attention.key.weight": (96, 96)})
    cfg = compose_config(["model=tiny_opt", "model.qformer.depth=2"]).model
    require_same_shape(cfg, source)
    with pytest.raises(UserError, match=r"model\.qformer\.cross_attention_every is 1, but 2 there"):
        require_same_shape(replace(cfg, qformer=replace(cfg.qformer, cross_attention_every=1)), source)


# what is left to the weights' origin


@pytest.mark.parametrize(
    ("name", "eps", "activation"),
    [
        (None, 1e-5, Activation.gelu),
        ("lavis/stage2_t5.pth", 1e-5, Activation.gelu),
        ("huggingface/t5", 1e-6, Activation.gelu_tanh),
        ("language/t5", 1e-5, Activation.gelu),  # FlanT5 alone says tanh, but BLIP-2 reads it with the exact one
    ],
)
def test_null_is_what_the_origin_computes(name, eps, activation):
    cfg = compose_config(["model=flant5xl"]).model
    assert cfg.ln_vision_eps is None and cfg.language.activation is None
    source = open_source(PARITY / name) if name else None
    followed = follow_source(cfg, source)
    assert (followed.ln_vision_eps, followed.language.activation) == (eps, activation)
    assert cfg.ln_vision_eps is None and cfg.language.activation is None
    assert follow_source(followed, open_source(PARITY / "huggingface/t5")) == followed


def test_what_is_set_wins():
    cfg = compose_config(["model=flant5xl", "model.ln_vision_eps=1e-3", "model.language.activation=gelu"]).model
    assert follow_source(cfg, open_source(PARITY / "huggingface/t5")) == cfg


# checkpoints of ours


def saved(folder: Path, model: str, stage: int, *overrides: str, frozen: tuple[str, ...] = ()) -> tuple[Source, Any]:
    cfg = follow_source(compose_config([f"model={model}", *overrides]).model, None)
    built = build_stage1(cfg, vocab_size=20) if stage == 1 else build_stage2(cfg, vocab_size=20)
    for part in frozen:
        freeze(getattr(built, part))
    extra = {"settings": settings_of(cfg, [part for part in PARTS if hasattr(built, part)])}
    origin = dict.fromkeys(frozen, "elsewhere")
    save_checkpoint(folder, built, kind="k", step=1, frozen_origin=origin, extra=extra)
    return open_source(folder), cfg


@pytest.mark.parametrize("frozen", [(), ("vision",), ("vision", "language")])
@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
def test_a_checkpoint_says_all_of_its_model_whether_parts_are_frozen_or_not(tmp_path, model, frozen):
    source, cfg = saved(tmp_path / "c", model, 2, frozen=frozen)
    said = describe(source)
    for part in PARTS:
        for key, value in vars(getattr(cfg, part)).items():
            if key in ("frozen", "recompute", "weights", "tokenizer", "dropout", "drop_path_rate"):
                assert f"{part}.{key}" not in said
            elif value is not None:
                assert said[f"{part}.{key}"] == getattr(value, "value", value), key
    assert said["ln_vision_eps"] == 1e-5
    if not frozen:
        assert said["language.vocab_size"] == 20  # the tokenizer's, which the config leaves open
    require_same_shape(cfg, source)


def test_a_checkpoint_remembers_its_epsilon_and_its_gelu(tmp_path):
    overrides = ["model.ln_vision_eps=1e-6", "model.language.activation=gelu_tanh"]
    source, _ = saved(tmp_path / "c", "tiny_t5", 2, *overrides, frozen=("vision", "language"))
    followed = follow_source(compose_config(["model=tiny_t5"]).model, source)
    assert (followed.ln_vision_eps, followed.language.activation) == (1e-6, Activation.gelu_tanh)


def test_a_checkpoint_of_before_says_what_its_shapes_say(tmp_path):
    cfg = follow_source(compose_config(["model=tiny_opt"]).model, None)
    save_checkpoint(tmp_path / "c", build_stage1(cfg, vocab_size=20), kind="pretrain_stage1", step=1)
    said = describe(open_source(tmp_path / "c"))
    assert said["vision.width"] == said["qformer.width"] == 96 and said["qformer.cross_attention_every"] == 2
    assert "vision.num_heads" not in said and said["ln_vision_eps"] == 1e-5


@pytest.mark.parametrize(("part", "stored"), [("vision", "vision.linear.weight"), ("language", "language.linear.weight")])
def test_a_part_of_the_users_own_kind_is_only_what_was_recorded(tmp_path, part, stored):
    model = nn.LayerDict({part: nn.LayerDict({"linear": nn.Linear(2, 2)})})
    paddle.seed(0)
    extra = {"settings": {f"{part}.kind": "mine", f"{part}.width": 2}}
    source = open_source(save_checkpoint(tmp_path / "c", model, kind="k", step=1, extra=extra))
    assert stored in source.tensors and describe(source) == extra["settings"]
    cfg = compose_config(["model=tiny_opt"]).model
    setattr(cfg, part, replace(getattr(cfg, part), kind="mine", width=3))
    with pytest.raises(UserError, match=rf"model\.{part}\.width is 3, but 2 there"):
        require_same_shape(cfg, source)
