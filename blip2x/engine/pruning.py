"""Stopping the trainings of a sweep that do worse than those before them (the median rule of Google's Vizier)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from blip2x.config.run import PruneConfig
from blip2x.config.task import Best
from blip2x.engine.loggers import METRICS_FILE, metric_lines
from blip2x.engine.run import Run


class Pruned(Exception):  # no error: the run has come to an end that it was given
    """A training was stopped for being worse than others; its run is complete.

    Args:
        message: a sentence that says by how much.
        stage: the training.
        step: its last step.
    """

    def __init__(self, message: str, stage: str, step: int):
        super().__init__(message)
        self.stage, self.step = stage, step


class MedianPruner:
    """Called with the metrics of a step, raises `Pruned` on all ranks where they are worse than the median of other runs.

    Args:
        cfg: its `metric` is set.
        run: of the training; the other runs are in the folders beside the run's.
    """

    def __init__(self, cfg: PruneConfig, run: Run):
        self._cfg, self._run = cfg, run
        self._stage, _, self._name = cfg.metric.partition(".")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Compare; nothing happens where the metric is none of `metrics`, or too few runs have come to the step."""
        if self._run.stage != self._stage or self._name not in metrics or step < self._cfg.min_step:
            return
        why = self._run.context.broadcast_object(self._worse(step, metrics[self._name]) if self._run.context.is_main else None)
        if why is not None:
            raise Pruned(why, self._stage, step)

    def _worse(self, step: int, value: float) -> str | None:
        others = [other for path in self._beside() if (other := self._at(path, step)) is not None]
        if len(others) < self._cfg.min_runs:
            return None
        middle = median(others)
        if value <= middle if self._cfg.best_is is Best.min else value >= middle:
            return None
        return f"{self._cfg.metric} is {value:.4g} at step {step}, and {middle:.4g} in the middle of {len(others)} other runs"

    def _beside(self) -> Iterator[Path]:
        own = self._run.root.resolve()
        return (path for path in own.parent.glob(f"*/{METRICS_FILE}") if path.parent != own)

    def _at(self, path: Path, step: int) -> float | None:
        """The metric of another run at `step`, the last one where it was written twice."""
        found = None
        for row in metric_lines(path):
            if row["stage"] == self._stage and row["step"] == step and math.isfinite(row.get(self._name, math.nan)):
                found = row[self._name]
        return found
