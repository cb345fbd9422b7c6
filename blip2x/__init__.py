"""BLIP-2 on PaddlePaddle: pre-training in two stages, captions and answers, as a Hydra experiment framework."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def load(source: Any, **options: Any) -> Any:
    """A model with its weights, and its processor: ``model, processor = blip2x.load("DIR or name")``; see `blip2x.api.load`."""
    return importlib.import_module("blip2x.api").load(source, **options)  # imports paddle: not before it is asked for
