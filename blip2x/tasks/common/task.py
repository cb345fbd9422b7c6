"""What all tasks share: what they read, what they make, and the check before long work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from blip2x.config.run import RunConfig
from blip2x.config.task import TaskConfig, trains
from blip2x.data.source import Source, Split
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.weights.describe import follow_source
from blip2x.tasks.common.features import keeps_features, require_room
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import report_skipped
from blip2x.tasks.common.weights import Start, Weights, require_trainable

T = TypeVar("T")


class Task:
    """A task reads a checked config, does its work in `run`, and hands back metrics and weights."""

    makes: ClassVar[tuple[str, ...]] = ()  # config keys of the weights that its result always sets
    shows_pictures: ClassVar[bool] = True  # to a model
    computes: ClassVar[bool] = True  # on the device, in the layout and the precision of the config

    def __init__(self, cfg: RunConfig, run: Run):
        weights = self.weights(cfg, frozenset())
        self.cfg = replace(cfg, model=follow_source(cfg.model, weights.source))
        self.task: Any = cfg.task
        self.run_folder = run
        self.context = run.context
        self.console = run.console

    @cached_property
    def source(self) -> Source:
        """The data set, read when a task first asks for it."""
        return build_source(self.cfg)

    def read(self, method: Callable[..., list[T]], *arguments: Any) -> list[T]:
        """What a method of the source gives; images that it left out are named. All ranks must call it."""
        found = method(*arguments)
        report_skipped(self.run_folder, self.source.skipped)
        return found

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """The source's methods that the task calls, with the split where they have one."""
        return []

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """The config keys of the weights that the task starts from."""
        return []

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start | None:
        """What `model.weights` must have; None: the task can do without."""
        return None

    @classmethod
    def promises(cls, cfg: RunConfig) -> set[str]:
        """The config keys of weights that later stages need not set: a whole model's checkpoint knows its parts' places."""
        made = cls.hands_on(cfg)
        return {*made, *(cls.weight_keys(cfg) if "model.weights" in made else ())}

    @classmethod
    def hands_on(cls, cfg: RunConfig) -> tuple[str, ...]:
        """The config keys of the weights that its result sets; a task that trains where it is told to makes a whole model."""
        return cls.makes or (("model.weights",) if trains(cfg.task) else ())

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """Names of what a validation during training gives, as far as they are known before; None: there is none."""
        return None

    @classmethod
    def weights(cls, cfg: RunConfig, promised: Set[str]) -> Weights:
        """The weights that the task starts from; without those that are `promised`, which are not there yet."""
        is_read = "model.weights" in cls.weight_keys(cfg) and "model.weights" not in promised
        return Weights(cfg.model, cfg.paths, cfg.model.weights if is_read else None)

    @classmethod
    def check(cls, cfg: RunConfig, promised: Set[str] = frozenset()) -> None:
        """Find missing data and weights before long work starts; `promised` are weight keys that earlier stages will set.

        Raises:
            UserError: the data set lacks what the task reads, or weights that it starts from are not there.
        """
        cls.check_weights(cfg, promised)
        if trains(cfg.task):
            _check_best_metric(cfg.task, cls.validation_metrics(cfg))
        if cls.shows_pictures:
            cls.weights(cfg, promised).check_pictures(cfg.dataset)
        for what, split in cls.reads(cfg):
            samples = getattr(build_source(cfg), what)(*([split] if split else []))
            cls.check_samples(cfg, split, samples)
            if split == "train" and trains(cfg.task) and keeps_features(cfg):
                require_room(cfg, samples)

    @classmethod
    def check_weights(cls, cfg: RunConfig, promised: Set[str] = frozenset()) -> None:
        """As `check`, of the weights alone, so that no data set is needed."""
        weights = cls.weights(cfg, promised)
        weights.require_same_shape()
        start = cls.starts_from(cfg)
        if start and "model.weights" not in promised:
            weights.require(start, cfg.task.kind)
        for part in ("vision", "qformer", "language"):
            key = f"model.{part}.weights"
            if key in cls.weight_keys(cfg) and key not in promised and weights.part(part) is None and key not in cls.makes:
                require_trainable(cfg.model, part)

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[Any]) -> None:
        """Raise `UserError` where the task cannot work with what it reads."""

    def run(self) -> TaskResult:
        """Do the work."""
        raise TypeError(f"{type(self).__name__} does not say how to run")

    def checkpoint_folder(self) -> Path:
        """Where the task's weights go."""
        return self.run_folder.path("checkpoint")


def _check_best_metric(task: TaskConfig, names: set[str] | None) -> None:
    metric = getattr(task, "best_metric", None)
    if metric is None or (names and metric in names):
        return
    choice = f"choose one of {', '.join(sorted(names))}" if names else "this task has no validation, so set it to null"
    raise UserError(f"task.best_metric={metric}: {choice}")
