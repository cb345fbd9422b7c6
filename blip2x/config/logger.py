"""The group ``logger``: each option is a key of its own under ``logger``, so that several can be chosen at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import List, Optional

from omegaconf import MISSING

from blip2x.config.rules import NOT_NEGATIVE, POSITIVE, choices, numbers
from blip2x.config.schema import schema


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl and the terminal."""

    kind: str = MISSING
    rows: int = MISSING  # at most so many predictions with their pictures in a table; 0: no tables


@schema("logger", "wandb")
@dataclass
class WandbConfig(LoggerConfig):
    """Weights & Biases."""

    kind: str = "wandb"
    project: str = MISSING  # where the run is listed
    entity: Optional[str] = MISSING  # null: that of the login
    mode: str = MISSING  # auto (online where this machine has a key, else offline) | online | offline
    tags: List[str] = MISSING  # to filter runs by
    group: Optional[str] = MISSING  # null: in a sweep its name, else none
    job_type: Optional[str] = MISSING  # null: the task
    notes: Optional[str] = MISSING  # a longer text about the run
    start_seconds: float = MISSING  # how long to wait for the server before the run is kept offline
    finish_seconds: float = MISSING  # how long to wait at the end until all is sent


@schema("logger", "tensorboard")
@dataclass
class TensorboardConfig(LoggerConfig):
    """TensorBoard's event files."""

    kind: str = "tensorboard"


def check_loggers(loggers: Mapping[str, LoggerConfig]) -> None:
    """Raise `UserError` where a value of a logger is impossible."""
    for name, cfg in loggers.items():
        numbers(f"logger.{name}", cfg, NOT_NEGATIVE, "rows")
        if isinstance(cfg, WandbConfig):
            choices(f"logger.{name}.mode", [cfg.mode], ("auto", "online", "offline"))
            numbers(f"logger.{name}", cfg, POSITIVE, "start_seconds", "finish_seconds")
