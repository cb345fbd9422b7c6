"""What a task leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TaskResult:
    """Metrics for results.json, and the weights that later stages of a pipeline start from.

    Attributes:
        metrics: name -> value; a baseline stands beside its metric as ``blind_<metric>``, ``majority_<metric>`` or ``chance``.
        weights: config key -> checkpoint folder, e.g. ``{"model.vision.weights": ...}``.
        stages: in a pipeline, each stage's metrics by its name; empty elsewhere.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Path] = field(default_factory=dict)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
