"""Stopping the trainings of a sweep that do worse than those before them (the median rule of Google's Vizier)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from blip2x.config.run import PruneConfig
from blip2x.config.task import Best
from blip2x.engine.loggers import METRICS_FILE
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
        self._logged: set[str] = set()  # metrics of the steps so far
        self._read: dict[Path, _Read] = {}  # of other runs

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        """Compare; nothing happens where the metric is none of `metrics`, or too few runs have come to the step."""
        self._logged |= metrics.keys()
        if self._run.stage != self._stage or self._name not in metrics or step < self._cfg.min_step:
            return
        why = self._run.context.broadcast_object(self._worse(step, metrics[self._name]) if self._run.context.is_main else None)
        if why is not None:
            raise Pruned(why, self._stage, step)

    def warn_if_unseen(self) -> None:
        """At the training's end, say so where it has not logged the metric before, so that nothing could be compared."""
        is_other_stage = self._run.stage != self._stage and self._run.folder != self._run.root  # of a pipeline
        if is_other_stage or (self._run.stage == self._stage and self._name in self._logged):
            return
        known = ", ".join(f"{self._run.stage}.{name}" for name in sorted(self._logged)) or "nothing"
        text = f"warning: prune.metric={self._cfg.metric} was not compared; before its last step this training logged {known}"
        self._run.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

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
        """The metric of another run at `step`, the last one where it was written twice; what was read before is not again."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            read = self._read.get(path)
            if read is None or read.inode != status.st_ino or read.offset > status.st_size:  # another file of that name
                read = self._read[path] = _Read(status.st_ino)
            file.seek(read.offset)
            for line in file:
                if not line.endswith(b"\n"):  # that run is writing it
                    break
                read.offset += len(line)
                if self._stage.encode() in line:
                    self._add(line, read.values)
        return read.values.get(step)

    def _add(self, line: bytes, values: dict[int, float]) -> None:
        try:
            row = json.loads(line)
        except ValueError:  # of a run that was killed while it wrote
            return
        if row["stage"] == self._stage and math.isfinite(row.get(self._name, math.nan)):
            values[row["step"]] = row[self._name]


@dataclass
class _Read:
    """What was read of another run's metrics.jsonl."""

    inode: int
    offset: int = 0  # bytes
    values: dict[int, float] = field(default_factory=dict)  # of the metric, by step
