"""Nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2x.config.run import LoggerConfig
from blip2x.registry import LOGGERS


class NoLogger:
    """Takes everything and keeps nothing."""

    def log(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        """Drop the metrics; metrics.jsonl has them."""

    def close(self) -> None:
        """Nothing is open."""


@LOGGERS.register("none")
def build(cfg: LoggerConfig, *, folder: Path, name: str, config: dict[str, Any], warn: Callable[[str], None]) -> NoLogger:
    """The logger of ``logger=none``."""
    return NoLogger()
