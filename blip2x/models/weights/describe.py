"""What a checkpoint says of its model: values of the config's ``model`` group, from shapes and Hugging Face's config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

from blip2x.config.auto import Settings
from blip2x.config.model import LN_VISION_EPS, Activation, ModelConfig, T5Config
from blip2x.errors import UserError
from blip2x.models.weights.names.language import OPT_WORDS
from blip2x.models.weights.source import Source

# values that may differ between a config and its weights: positions are interpolated, the rest changes no parameter
_FREE = {"vision.image_size", "ln_vision_eps", "language.activation", "language.question_prompt", "qformer.embed_dim"}
_NOT_OF_THE_SHAPE = {"frozen", "recompute", "weights", "tokenizer", "dropout", "drop_path_rate"}
_HEAD_WIDTH = {"vision": (88, 64), "qformer": (64,), "language": (64,)}  # of the published models, where a file does not say
_HEADS = {("language", 2560): 32, ("language", 4096): 32}
_OURS = {"vision": ("eva_vit", "clip_vit"), "language": ("opt", "t5")}  # kinds whose names are known
_WITH_LAST_BLOCK = {("EVA ViT", 1408, 40), ("CLIP ViT", 1024, 24)}  # family, width, depth, as published; BLIP-2 leaves it out


def describe(source: Source) -> Settings:
    """What is certain: of the parts that the source brings, and of the image encoder's width where it brings the Q-Former only.

    Raises:
        UserError: Hugging Face's config.json asks for something that blip2x's models do not have.
    """
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    settings: Settings = dict(source.manifest.get("extra", {}).get("settings", {}))
    if source.has("vision.") and settings.get("vision.kind", "eva_vit") in _OURS["vision"]:
        settings |= _vision(source, shapes)
    if source.has("qformer."):
        settings |= _qformer(source, shapes)
    if source.has("language.") and settings.get("language.kind", "opt") in _OURS["language"]:
        if OPT_WORDS in shapes:
            settings |= _opt(source, shapes)
        elif source.has("language.encoder.block."):
            settings |= _t5(source, shapes)
    if "language_proj.weight" in shapes:
        settings.setdefault("language.width", shapes["language_proj.weight"][1])
        if any(row.theirs.startswith("t5_proj.") for row in source.coverage):
            settings.setdefault("language.kind", "t5")
        if any(row.theirs.startswith("opt_proj.") for row in source.coverage):
            settings.setdefault("language.kind", "opt")
    if "ln_vision.weight" in shapes:
        default = 1e-6 if source.family == "Hugging Face" else 1e-5
        settings.setdefault("ln_vision_eps", source.config.get("vision_config", {}).get("layer_norm_eps", default))
    return settings


def require_same_shape(cfg: ModelConfig, source: Source, part: str | None = None) -> None:
    """Raise `UserError` where the config's model, or `part` of it, is not the checkpoint's.

    It names both values of every key that differs.
    """
    there, differences = describe(source), []
    for key, theirs in there.items():
        owner, _, name = key.rpartition(".")
        ours = getattr(getattr(cfg, owner) if owner else cfg, name, None)
        if (part is None or owner == part) and ours is not None and ours != theirs and not _fits(key, ours, there, source):
            differences.append(f"model.{key} is {ours}, but {theirs} there")
    if differences and part:
        raise UserError(
            f"model={cfg.name} does not fit the {part} weights of {source.path}: {'; '.join(differences)}; "
            "choose the model that fits, or other weights"
        )
    if differences:
        raise UserError(
            f"model={cfg.name} is not the model of {source.path}: {'; '.join(differences)}; choose that model, or model=auto"
        )


def _fits(key: str, ours: Any, there: Settings, source: Source) -> bool:
    """Whether weights serve although a value is another one."""
    if key == "language.vocab_size":  # Hugging Face has added a token for images, whose row is left out
        return there[key] > ours
    if key == "vision.depth":
        return source.family in ("EVA ViT", "CLIP ViT") and there[key] == ours + 1
    if key == "qformer.cross_attention_every":  # only the first layer looks
        return min(ours, there[key]) >= there["qformer.depth"]
    return key in _FREE


def guessed_heads(settings: Settings, part: str) -> int:
    """The number of heads of a model whose file does not say it, as in the published models.

    Raises:
        UserError: the width is none of theirs.
    """
    width = settings[f"{part}.width"]
    if (part, width) in _HEADS:
        return _HEADS[part, width]
    for head_width in _HEAD_WIDTH[part]:
        if width % head_width == 0:
            return width // head_width
    raise UserError(
        f"the file does not say how many heads its {part} part of width {width} has; say it with model.{part}.num_heads"
    )


def _require(source: Source, group: str, **expected: Any) -> None:
    """What shapes cannot tell and our models have in one way only; a value that is not written is the expected one."""
    config = source.config.get(group, {}) if group else source.config
    for name, ours in expected.items():
        if (theirs := config.get(name, ours)) != ours:
            where = f"{group}.{name}" if group else name
            raise UserError(f"{source.path / 'config.json'}: {where} is {theirs!r}, but blip2x's models have {ours!r}")


def _said(config: dict[str, Any], *, part: str, **names: str) -> Settings:
    """Values of config.json under our names, of those that are written there."""
    return {f"{part}.{ours}": config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _vision(source: Source, shapes: dict[str, tuple[int, ...]]) -> Settings:
    is_clip = "vision.norm.weight" in shapes
    _require(source, "vision_config", hidden_act="gelu", qkv_bias=True, layer_norm_eps=1e-6)
    try:
        patch = shapes["vision.embeddings.projection.weight"][-1]
        width, depth = shapes["vision.embeddings.class_token"][-1], _count(shapes, r"vision\.blocks\.(\d+)\.")
        settings = {
            "vision.kind": "clip_vit" if is_clip else "eva_vit",
            "vision.width": width,
            "vision.patch_size": patch,
            "vision.image_size": patch * math.isqrt(shapes["vision.embeddings.positions"][-2] - 1),
            "vision.depth": depth - ((source.family, width, depth) in _WITH_LAST_BLOCK),
            "vision.mlp_width": shapes["vision.blocks.0.fc1.weight"][1],
        }
    except KeyError as error:
        raise UserError(f"{source.path} lacks {error.args[0]} of the image encoder; copy or download it again") from error
    if not is_clip:
        settings["vision.key_bias"] = "vision.blocks.0.attention.qkv.bias" in shapes
    return settings | _said(
        source.config.get("vision_config", {}), num_heads="num_attention_heads", depth="num_hidden_layers", part="vision"
    )


def _qformer(source: Source, shapes: dict[str, tuple[int, ...]]) -> Settings:
    bert = source.family == "BERT"
    group = "" if bert else "qformer_config"
    _require(source, group, hidden_act="gelu", layer_norm_eps=1e-12, position_embedding_type="absolute")
    settings = {"qformer.depth": _count(shapes, r"qformer\.layers\.(\d+)\.")}
    if (queries := shapes.get("qformer.query_tokens")) is not None:
        settings |= {"qformer.num_queries": queries[1], "qformer.width": queries[2]}
    elif "qformer.embeddings_norm.weight" in shapes:
        settings["qformer.width"] = shapes["qformer.embeddings_norm.weight"][0]
    if "qformer.layers.0.query_ffn.fc1.weight" in shapes:
        settings["qformer.mlp_width"] = shapes["qformer.layers.0.query_ffn.fc1.weight"][1]
    looking = sorted(
        int(match[1]) for name in shapes if (match := re.match(r"qformer\.layers\.(\d+)\.cross_attention\.key\.w", name))
    )
    if looking:
        settings["vision.width"] = shapes[f"qformer.layers.{looking[0]}.cross_attention.key.weight"][0]
        settings["qformer.cross_attention_every"] = looking[1] - looking[0] if len(looking) > 1 else settings["qformer.depth"]
    if not bert and "qformer.text.word_embeddings.weight" in shapes:
        settings["qformer.vocab_size"] = shapes["qformer.text.word_embeddings.weight"][0]
        settings["qformer.max_positions"] = shapes["qformer.text.position_embeddings.weight"][0]
    if "vision_proj.weight" in shapes:
        settings["qformer.embed_dim"] = shapes["vision_proj.weight"][1]
    config = source.config if bert else source.config.get("qformer_config", {})
    every = {} if bert else {"cross_attention_every": "cross_attention_frequency"}
    return settings | _said(config, part="qformer", num_heads="num_attention_heads", depth="num_hidden_layers", **every)


def _opt(source: Source, shapes: dict[str, tuple[int, ...]]) -> Settings:
    alone = source.family == "Hugging Face OPT"
    group = "" if alone else "text_config"
    _require(source, group, model_type="opt", do_layer_norm_before=True, activation_function="relu")
    _require(source, group, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    vocabulary, width = shapes[OPT_WORDS]
    settings = {
        "language.kind": "opt",
        "language.width": width,
        "language.depth": _count(shapes, r"language\.opt\.decoder\.layers\.(\d+)\."),
        "language.mlp_width": shapes.get("language.opt.decoder.layers.0.linear1.weight", (0, 0))[1],
        "language.vocab_size": vocabulary,
        "language.max_positions": shapes.get("language.opt.embeddings.position_embeddings.weight", (0,))[0] - 2,
    }
    config = source.config if alone else source.config.get("text_config", {})
    return settings | _said(config, part="language", num_heads="num_attention_heads", depth="num_hidden_layers")


def _t5(source: Source, shapes: dict[str, tuple[int, ...]]) -> Settings:
    alone = source.family == "Hugging Face T5"
    config = source.config if alone else source.config.get("text_config", {})
    _require(source, "" if alone else "text_config", model_type="t5", layer_norm_epsilon=1e-6, scalable_attention=True)
    if config and not str(config.get("feed_forward_proj")).startswith("gated-"):
        raise UserError(
            f"{source.path / 'config.json'}: feed_forward_proj is {config.get('feed_forward_proj')!r}, but blip2x's T5 has a "
            "gated one, as FlanT5 and T5 1.1"
        )
    if config and config.get("tie_word_embeddings", True):
        raise UserError(
            f"{source.path / 'config.json'}: tie_word_embeddings is true, but blip2x's T5 has a head of its own, as FlanT5 and "
            "T5 1.1"
        )
    positions = "language.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    try:
        buckets, heads = shapes[positions]
        vocabulary, width = shapes["language.shared.weight"]
        settings: Settings = {
            "language.kind": "t5",
            "language.width": width,
            "language.encoder_depth": _count(shapes, r"language\.encoder\.block\.(\d+)\."),
            "language.decoder_depth": _count(shapes, r"language\.decoder\.block\.(\d+)\."),
            "language.num_heads": heads,
            "language.head_width": shapes["language.encoder.block.0.layer.0.SelfAttention.q.weight"][1] // heads,
            "language.mlp_width": shapes["language.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][1],
            "language.vocab_size": vocabulary,
            "language.relative_buckets": buckets,
        }
    except KeyError as error:
        raise UserError(f"{source.path} lacks {error.args[0]} of T5; copy or download it again") from error
    if config:
        settings["language.relative_max_distance"] = config.get("relative_attention_max_distance", 128)
        depths = {"encoder_depth": "num_layers", "decoder_depth": "num_decoder_layers"}
        settings |= _said(config, part="language", num_heads="num_heads", **depths)
    if not alone and config:
        # FlanT5's own configuration says tanh; LAVIS computes BLIP-2 with the exact one, and Hugging Face with this one
        exact = config.get("dense_act_fn", "gelu_new") == "gelu"
        settings["language.activation"] = "gelu" if exact else "gelu_tanh"
    return settings


def follow_source(cfg: ModelConfig, source: Source | None) -> ModelConfig:
    """`cfg` with what it leaves to the weights' origin: the epsilon of `ln_vision`, and T5's activation.

    Without a source, or where that does not say, as LAVIS computes: 1e-5, and the exact GELU.
    """
    settings = describe(source) if source else {}
    if cfg.ln_vision_eps is None:
        cfg = replace(cfg, ln_vision_eps=settings.get("ln_vision_eps", LN_VISION_EPS))
    if isinstance(cfg.language, T5Config) and cfg.language.activation is None:
        activation = Activation[settings.get("language.activation", "gelu")]
        cfg = replace(cfg, language=replace(cfg.language, activation=activation))
    return cfg


def settings_of(cfg: ModelConfig, parts: Iterable[str]) -> Settings:
    """What a checkpoint has to remember of its model's parts, so that `describe` can tell it."""
    settings: Settings = {"ln_vision_eps": cfg.ln_vision_eps} if cfg.ln_vision_eps else {}
    for part in parts:
        for name, value in asdict(getattr(cfg, part)).items():
            if name not in _NOT_OF_THE_SHAPE and value is not None:
                settings[f"{part}.{name}"] = value.value if isinstance(value, Enum) else value
    return settings
