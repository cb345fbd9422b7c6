"""Where weights are: what the config names, and what a whole model's checkpoint remembers of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2x.config.dataset import DatasetConfig
from blip2x.config.model import ModelConfig
from blip2x.config.run import RunConfig
from blip2x.errors import UserError
from blip2x.models.weights.checkpoint import read_manifest


@dataclass(frozen=True)
class Start:
    """What a task asks of `model.weights`."""

    tensors: str  # how the names of tensors start that have to be there
    tasks: str  # whose checkpoints have them


STAGE2 = Start("language_proj.", "pretrain_stage2 or caption")


class Weights:
    """The folders of a model's weights.

    Args:
        cfg: the whole config.
        whole: the value of `model.weights`; None: as if it were not set.

    Raises:
        UserError: `whole` names no folder, or later, when a method looks: the same for a part.
    """

    def __init__(self, cfg: RunConfig, whole: str | None):
        self.cfg = cfg.model
        self.root = cfg.paths.weights
        self.whole = None if whole is None else weights_folder(whole, self.root, "model.weights")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The whole model's; without one, an empty manifest."""
        return read_manifest(self.whole) if self.whole else {"tensors": {}, "frozen": {"origin": {}}, "extra": {}}

    def brings(self, part: str) -> bool:
        """Whether the whole model's checkpoint holds the weights of `part`, because it was trained there."""
        return any(name.startswith(f"{part}.") for name in self.manifest["tensors"])

    def folder(self, part: str) -> Path | None:
        """The folder with the weights of `part`: the whole model's, else as configured, else where they were in training."""
        key, configured = f"model.{part}.weights", getattr(self.cfg, part).weights
        if self.brings(part):
            return self.whole
        if configured is not None:
            return weights_folder(configured, self.root, key)
        origin = self.manifest["frozen"]["origin"].get(part)
        if origin is None:
            return None
        # a run folder that was moved or copied keeps its parts' places relative to each other
        beside = self.whole.resolve().parent.parent.joinpath(*Path(origin).parts[-2:])
        folder = next((folder for folder in (Path(origin), beside) if folder.is_dir()), None)
        if folder is None:
            raise UserError(f"{self.whole} was trained with the {part} weights of {origin}, which are not there; set {key}")
        return folder

    def require(self, start: Start, task: str) -> None:
        """Raise `UserError` unless `task` can start from the whole model's checkpoint."""
        if self.whole is None:
            raise UserError(
                f"task={task} needs a trained model: set model.weights to a checkpoint of {start.tasks}, "
                "or run all stages with task=pipeline"
            )
        if not any(name.startswith(start.tensors) for name in self.manifest["tensors"]):
            raise UserError(
                f"model.weights={self.whole} is a checkpoint of {self.manifest['kind']}, "
                f"but task={task} needs one of {start.tasks}"
            )

    def check_pictures(self, dataset: DatasetConfig) -> None:
        """Raise `UserError` where a frozen image encoder would be shown pictures in other numbers than in training."""
        before = self.manifest["extra"].get("normalisation")
        now = normalisation(dataset)
        if before and before != now and self.cfg.vision.frozen:
            raise UserError(
                f"{self.whole} was trained on pictures normalised by mean={before['mean']} std={before['std']}, but "
                f"dataset={dataset.name} has mean={now['mean']} std={now['std']}; choose the data set that it was trained on, "
                "or set dataset.transform.mean and dataset.transform.std"
            )


def normalisation(dataset: DatasetConfig) -> dict[str, list[float]]:
    """How a data set's pictures become numbers, for a checkpoint to remember."""
    return {"mean": list(dataset.transform.mean), "std": list(dataset.transform.std)}


def weights_folder(name: str, root: str, key: str) -> Path:
    """The folder that `key`'s value means: a path, or a name below `paths.weights`.

    Raises:
        UserError: neither is there.
    """
    for folder in (Path(name), Path(root) / name):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{key}={name}: no folder {name} and none at {Path(root) / name}; put the weights there, or give another path "
        "(paths.weights, or the environment variable BLIP2X_WEIGHTS, sets where names are looked up)"
    )


def require_trainable(cfg: ModelConfig, part: str) -> None:
    """Raise `UserError` where `part` is frozen; call it where nothing gives its weights, so that it would stay random."""
    if getattr(cfg, part).frozen:
        raise UserError(
            f"model.{part}.frozen=true, but nothing says where its weights come from; set model.{part}.weights, or "
            f"model.{part}.frozen=false to train it"
        )
