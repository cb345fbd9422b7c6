"""What the names of metrics say, and nested values under one name each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCORES = ("CIDEr", "BLEU", "METEOR", "ROUGE", "SPICE")
_LOSSES = ("itc", "itm", "lm", "perplexity")


def best_value(name: str) -> str | None:
    """Which value of a metric is the best one: "max" of a score, "min" of a loss; None: none is, as of a learning rate."""
    for word in name.split("/"):  # scope/name/part
        word = word.removeprefix("blind_").removeprefix("eval_")
        if word.startswith(_SCORES) or "accuracy" in word or "recall@" in word or word.endswith("r_mean"):
            return "max"
        if word == "loss" or word.endswith("_loss") or word in _LOSSES:
            return "min"
    return None


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a/b": 1}."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}{key}/") if isinstance(inner, Mapping) else {f"{prefix}{key}": inner}
    return found
