"""Weights & Biases, imported only where it is chosen; when it fails the run goes on without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip2x.config.run import WandbConfig
from blip2x.engine.loggers.none import NoLogger
from blip2x.registry import LOGGERS

SECONDS_TO_CONNECT = 30.0


class WandbLogger:
    """One W&B run; every stage counts its own steps."""

    def __init__(self, run: Any, warn: Callable[[str], None]):
        self._run = run
        self._warn = warn
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        """Log `metrics` as ``<stage>/<name>`` over ``<stage>/step`` (W&B's own step may not start again at 0)."""
        if self._run is None:
            return
        try:
            if stage not in self._stages:
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._stages.add(stage)
            self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        # any of wandb's errors: a chart is not worth a training; metrics.jsonl has every number
        self._run = None
        self._warn(f"Weights & Biases stopped ({error}); the run goes on, its numbers are in metrics.jsonl")


@LOGGERS.register("wandb")
def build(
    cfg: WandbConfig, *, folder: Path, name: str, config: dict[str, Any], warn: Callable[[str], None]
) -> WandbLogger | NoLogger:
    """Start a W&B run that keeps its files in `folder`; it never asks anything.

    What keeps it from starting (no login, no network) is one warning, and the run goes on without it.
    """
    try:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if cfg.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in: run `wandb login`, or choose logger.mode=offline")
        run = wandb.init(
            project=cfg.project,
            entity=cfg.entity,
            mode=cfg.mode,
            tags=list(cfg.tags),
            name=name,
            dir=str(folder),
            config=config,
            settings=wandb.Settings(silent=True, console="off", init_timeout=SECONDS_TO_CONNECT),
        )
    except Exception as error:  # wandb's errors have no common base
        warn(f"Weights & Biases did not start ({error}); the run goes on without it")
        return NoLogger()
    return WandbLogger(run, warn)
