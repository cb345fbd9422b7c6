"""The checkpoints of one training: which are written and kept, and the newest that can be gone on from."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from blip2x.config.task import Best, TrainingConfig
from blip2x.engine.folders import bytes_below
from blip2x.engine.run import Run
from blip2x.engine.training_state import TrainingState
from blip2x.errors import UserError
from blip2x.models.weights.manifest import read_manifest

FINAL = "checkpoint"  # in a run's folder, when the training is over
ON_THE_WAY = "checkpoints"  # the folder of those before
_VALIDATION = "validation.json"  # in that folder: step -> metrics


class Prepare(Protocol):
    """Gives what writes a checkpoint into `folder`; with `copy`, what is written is what the model is now."""

    def __call__(self, folder: Path, state: TrainingState, *, copy: bool) -> Callable[[], Any]:
        """Errors, as far as they can be seen before, are raised here."""


class Checkpoints:
    """The folder ``checkpoint`` of a finished training and ``checkpoints/step-<n>`` of one on its way. Rank 0's business.

    A checkpoint on the way that cannot be written is a warning, since the former one is still there; the final one must be.

    Args:
        run: whose folder and console.
        cfg: which ones to keep.
        prepare: makes one.
    """

    def __init__(self, run: Run, cfg: TrainingConfig, prepare: Prepare):
        self._run = run
        self._cfg = cfg
        self._prepare = prepare
        self._folder = run.folder / ON_THE_WAY
        self._step = 0  # of the newest
        self._writing: threading.Thread | None = None
        self._trouble: Exception | None = None

    def save(self, state: TrainingState, *, final: bool) -> None:
        """Write the checkpoint of `state`; in the background where the config says so.

        Raises:
            UserError: the final one cannot be written.
        """
        self.wait()
        self._step = state.step
        if final:
            path = self._run.path(FINAL)
            try:
                self._prepare(path, state, copy=False)()
            except OSError as error:
                raise UserError(
                    f"the finished training cannot be saved in {path}: {error}; mend that, and resume=auto goes on from the "
                    "checkpoint before"
                ) from error
            self._prune(newest=self._cfg.keep_last - 1)
            return
        folder = self._run.path(ON_THE_WAY, f"step-{state.step:08d}")
        background = self._cfg.save_in_background
        try:
            write = self._prepare(folder, state, copy=background)
        except UserError as error:
            self._warn(error)
            return
        self._writing = threading.Thread(target=self._write, args=(write,), name="checkpoint")
        self._writing.start()
        if not background:
            self.wait()

    def bytes_to_come(self, each: int) -> int:
        """What those of so many bytes will take of the disk beside the ones that are there."""
        most = self._cfg.keep_last + self._cfg.keep_best + 1  # an old one goes when the new one is whole
        return max(0, most * each - bytes_below(self._folder) - bytes_below(self._run.folder / FINAL))

    def wait(self) -> None:
        """Until what is being written in the background is on the disk."""
        if self._writing:
            self._writing.join()
            self._writing = None
            if self._trouble:
                self._warn(self._trouble)
                self._trouble = None
            self._prune(newest=self._cfg.keep_last)

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """Remember the metrics of step `step`, by which the best checkpoints are kept."""
        try:
            self._run.write_json({**validations(self._run.folder), str(step): metrics}, ON_THE_WAY, _VALIDATION)
        except OSError as error:
            self._say(f"the validation of step {step} could not be written down, so it is not among the best: {error}")

    def best(self) -> Path | None:
        """The kept checkpoint, the final one among them, whose validation was the best; None: no metric was asked for."""
        there = {folder: _step(folder) for folder in _on_the_way(self._run.folder)}
        if (self._run.folder / FINAL).exists():
            there[self._run.folder / FINAL] = read_manifest(self._run.folder / FINAL)["step"]
        return next(iter(self._by_metric(there)), None)

    def _by_metric(self, steps: Mapping[Path, int]) -> list[Path]:
        """Those that have the metric, the best one first."""
        metric, found = self._cfg.best_metric, validations(self._run.folder)
        scores = {folder: found.get(str(step), {}).get(metric) for folder, step in steps.items()}
        scored = [folder for folder, value in scores.items() if value is not None and math.isfinite(value)]
        return sorted(scored, key=scores.__getitem__, reverse=self._cfg.best_is is Best.max)

    def _write(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # a thread's would be lost
            self._trouble = error

    def _warn(self, error: Exception) -> None:
        if not isinstance(error, (OSError, UserError)):
            raise error
        self._say(f"the checkpoint could not be saved, the training goes on and the former one is kept: {error}")

    def _say(self, warning: str) -> None:
        self._run.console.print(f"warning: {warning}", style="yellow", markup=False)

    def _prune(self, *, newest: int) -> None:
        all_there = _on_the_way(self._run.folder)
        # later ones were passed over as damaged when the run was gone on with: they must not take a whole one's place
        there = [folder for folder in all_there if _step(folder) <= self._step]
        best = self._by_metric({folder: _step(folder) for folder in there})
        kept = {*there[max(0, len(there) - newest) :], *best[: self._cfg.keep_best]}
        for folder in all_there:
            if folder not in kept:
                gone = folder.with_name(f".{folder.name}.old")  # half of it must not look like a whole one
                shutil.rmtree(gone, ignore_errors=True)
                folder.rename(gone)
        for left in self._folder.glob(".step-*"):  # and what runs that were killed have left
            shutil.rmtree(left, ignore_errors=True)


def validations(folder: Path) -> dict[str, dict[str, float]]:
    """Step -> metrics of the training in a run's folder."""
    try:
        return json.loads((folder / ON_THE_WAY / _VALIDATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a run's folder, or `folder` where it is a checkpoint itself; None where there is none.

    `say` is told about those that are passed over because they are damaged.
    """
    candidates = [*([folder / FINAL] if (folder / FINAL).exists() else []), *reversed(_on_the_way(folder))]
    if (folder / "manifest.json").is_file():
        candidates = [folder]
    for candidate in candidates:
        try:
            read_manifest(candidate, every_byte=True)
            return candidate
        except UserError as error:
            say(f"passed over {candidate}: {error}")
    return None


def _on_the_way(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted((path for path in (folder / ON_THE_WAY).glob("step-[0-9]*") if path.is_dir()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
