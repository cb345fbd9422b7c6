"""Numbers of a model that are impossible, alone or beside another one."""

from __future__ import annotations

from typing import Any

from blip2x.config.model import LanguageConfig, ModelConfig, OptConfig, T5Config
from blip2x.config.rules import AT_LEAST_1, POSITIVE, SHARE, numbers
from blip2x.errors import UserError


def check_model(cfg: ModelConfig) -> None:
    """Raise `UserError` where a number of the model is impossible, alone or beside another one."""
    for name, part in (("vision", cfg.vision), ("qformer", cfg.qformer)):
        numbers(f"model.{name}", part, AT_LEAST_1, "width", "depth", "num_heads", "mlp_width")
        _check_heads(f"model.{name}", part)
    numbers("model.vision", cfg.vision, AT_LEAST_1, "image_size", "patch_size")
    numbers("model.vision", cfg.vision, SHARE, "drop_path_rate")
    if cfg.vision.image_size % cfg.vision.patch_size:
        raise UserError(
            f"model.vision.image_size={cfg.vision.image_size} is not a multiple of "
            f"model.vision.patch_size={cfg.vision.patch_size}"
        )
    counts = ("num_queries", "cross_attention_every", "vocab_size", "max_positions", "embed_dim")
    numbers("model.qformer", cfg.qformer, AT_LEAST_1, *counts)
    numbers("model.qformer", cfg.qformer, SHARE, "dropout")
    _check_language(cfg.language)
    numbers("model", cfg, POSITIVE, "temperature", "ln_vision_eps")


def _check_language(cfg: LanguageConfig) -> None:
    numbers("model.language", cfg, AT_LEAST_1, "width", "num_heads", "mlp_width", "vocab_size")
    numbers("model.language", cfg, SHARE, "dropout")
    if isinstance(cfg, OptConfig):
        numbers("model.language", cfg, AT_LEAST_1, "depth", "max_positions")
        _check_heads("model.language", cfg)
    if isinstance(cfg, T5Config):
        counts = ("encoder_depth", "decoder_depth", "head_width", "relative_buckets", "relative_max_distance")
        numbers("model.language", cfg, AT_LEAST_1, *counts)


def _check_heads(prefix: str, part: Any) -> None:
    if part.width % part.num_heads:
        raise UserError(f"{prefix}.width={part.width} is not a multiple of {prefix}.num_heads={part.num_heads}")
