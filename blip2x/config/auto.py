"""``model=auto``: a model that is what its weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip2x.config.model import ClipVitConfig, EvaVitConfig, ModelConfig, OptConfig, QFormerConfig, T5Config
from blip2x.errors import UserError

AUTO = "auto"
PARTS = ("vision", "qformer", "language")
CONF_FOLDER = Path(__file__).resolve().parents[2] / "conf"

Settings = dict[str, Any]  # dotted key below `model` -> value

_SCHEMAS = {"eva_vit": EvaVitConfig, "clip_vit": ClipVitConfig, "qformer": QFormerConfig, "opt": OptConfig, "t5": T5Config}
_VISION = {1408: "eva_vit_g", 1024: "clip_vit_l"}
_LANGUAGE = {("opt", 2560): "opt2.7b", ("opt", 4096): "opt6.7b", ("t5", 2048): "flant5xl", ("t5", 4096): "flant5xxl"}
_KINDS = {"eva_vit_g": "eva_vit", "clip_vit_l": "clip_vit", **{option: kind for (kind, _), option in _LANGUAGE.items()}}
_USUAL = {"eva_vit": "eva_vit_g", "clip_vit": "clip_vit_l", "opt": "opt2.7b", "t5": "flant5xl"}


def auto_defaults() -> Settings:
    """The values of ``conf/model/auto.yaml``."""
    values = yaml.safe_load((CONF_FOLDER / "model" / f"{AUTO}.yaml").read_text(encoding="utf-8"))
    del values["defaults"]
    return values


def typed(group: DictConfig) -> Settings:
    """What is set in a composed ``model`` group whose parts are open, by dotted key."""
    found: Settings = {}
    for name in group:
        if name in PARTS:
            found |= {f"{name}.{key}": group[name][key] for key in group[name] if not OmegaConf.is_missing(group[name], key)}
        elif not OmegaConf.is_missing(group, name):
            found[name] = group[name]
    return found


def auto_model(given: Settings, described: Settings, heads: Callable[[Settings, str], int]) -> DictConfig:
    """The ``model`` group, filled in.

    Args:
        given: what is set, by dotted key; it wins over what the weights say.
        described: what the weights say, of all parts or some.
        heads: guesses a part's number of heads from what is known, where the weights do not say it.

    Raises:
        UserError: the weights do not say what a part is, and nothing that is given says it; or a key that is none.
    """
    values = described | given
    model = OmegaConf.structured(ModelConfig)
    try:
        for part in PARTS:
            model[part] = _part(part, values, described, heads)
        for key, value in given.items():
            if "." not in key:
                model[key] = value
    except OmegaConfBaseException as error:
        raise UserError(f"model={AUTO}, key {error.full_key}: {' '.join(str(error.msg).split())}") from error
    return model


def _part(part: str, values: Settings, described: Settings, heads: Callable[[Settings, str], int]) -> DictConfig:
    kind, option = _option(part, values)
    node = OmegaConf.merge(OmegaConf.structured(_SCHEMAS[kind]), _yaml(part, option))
    # the kind is the node's class
    own = {
        key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{part}.") and key != f"{part}.kind"
    }
    is_brought = f"{part}.depth" in described or f"{part}.encoder_depth" in described
    if is_brought and f"{part}.weights" not in values:
        node.weights = None
    if is_brought and "num_heads" not in own:
        own["num_heads"] = heads(values, part)
    return OmegaConf.merge(node, own)


def _option(part: str, values: Settings) -> tuple[str, str]:
    """The part's kind, and the option of its group whose other values it takes."""
    if part == "qformer":
        return "qformer", "bert_base"
    kind, width = values.get(f"{part}.kind"), values.get(f"{part}.width")
    if part == "vision":
        option = _VISION.get(width)
        kind = kind or _KINDS.get(option)
    elif width is None and kind is None:  # stage 1: no language model is built
        return "opt", "opt2.7b"
    else:
        option = _LANGUAGE.get((kind, width))
    if kind is None or (option is None and f"{part}.mlp_width" not in values):
        raise UserError(
            f"model=auto: the weights do not hold the {part} part, and no published one has width {width}; "
            f"say where it is with model.{part}.weights"
        )
    return kind, option if option and _KINDS[option] == kind else _USUAL[kind]


def _yaml(part: str, option: str) -> dict[str, Any]:
    values = yaml.safe_load((CONF_FOLDER / "model" / part / f"{option}.yaml").read_text(encoding="utf-8"))
    del values["defaults"]
    return values
