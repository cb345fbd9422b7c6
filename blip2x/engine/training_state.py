"""What a training needs beside its weights to go on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from blip2x.errors import UserError
from blip2x.models.weights.stored import StoredTensor
from blip2x.models.weights.write import write_safetensors

FOLDER = "training"  # inside a checkpoint
_STATE_FILE, _OPTIMIZER_FILE = "state.json", "optimizer.safetensors"


@dataclass(frozen=True)
class Position:
    """How far into the data: whole epochs, and samples of the next one that all data ranks together have had."""

    epoch: int = 0
    samples: int = 0


@dataclass(frozen=True)
class TrainingState:
    """The state behind optimizer step `step`, counted from 1.

    Attributes:
        step: optimizer steps done, those that were left out for nan included.
        position: in the data.
        seconds: that the training has taken, saving and validation included.
        skipped: optimizer steps left out so far.
        loss_scale: of float16.
        metrics: the newest line of the training in metrics.jsonl.
        ranks: by data rank, its generators ("random") and the losses that no line in metrics.jsonl has yet ("losses").
        optimizer: AdamW's moments, whole, by "<parameter>.<kind>".
    """

    step: int
    position: Position
    seconds: float
    skipped: int
    loss_scale: dict[str, Any]
    metrics: dict[str, float]
    ranks: list[dict[str, Any]]
    optimizer: Mapping[str, np.ndarray]

    def write(self, checkpoint: Path) -> None:
        """Into the folder ``training`` of a checkpoint that is being written."""
        folder = checkpoint / FOLDER
        folder.mkdir()
        tensors = {name: StoredTensor.of(name, array) for name, array in self.optimizer.items()}
        write_safetensors(folder / _OPTIMIZER_FILE, tensors)
        fields = {name: getattr(self, name) for name in ("step", "seconds", "skipped", "loss_scale", "metrics", "ranks")}
        text = json.dumps({**fields, "position": asdict(self.position)})
        (folder / _STATE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> TrainingState:
        """From a checkpoint.

        Raises:
            UserError: it has none, or its files cannot be read.
        """
        folder = checkpoint / FOLDER
        if not (folder / _STATE_FILE).is_file():
            raise UserError(f"{checkpoint} has weights only, no state of a training to go on from; start with model.weights=")
        try:
            fields = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
            position = Position(**fields.pop("position"))
            return cls(**fields, position=position, optimizer=load_file(folder / _OPTIMIZER_FILE))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder} is damaged ({error}); go on from another checkpoint") from error
