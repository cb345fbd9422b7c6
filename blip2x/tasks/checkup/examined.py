"""What is looked at: each task of the command, with what the checks share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paddle import nn

from blip2x.config.compose import compose_config, inner_overrides
from blip2x.config.model import ModelConfig
from blip2x.config.run import RunConfig
from blip2x.config.task import PipelineConfig, trains
from blip2x.config.tools import DoctorConfig, KeysShown
from blip2x.data.source import Source
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout, Prediction
from blip2x.parallel.devices import started_processes
from blip2x.registry import TASKS
from blip2x.tasks.checkup.findings import sentence
from blip2x.tasks.checkup.memory import Texts, label_classes, model_of, prediction_of, stage_of, texts_of
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.weights import Weights
from blip2x.tasks.pipeline import plan_stages


@dataclass(frozen=True)
class Wanted:
    """A task to look at, before there is a run.

    Attributes:
        cfg: its config.
        words: the overrides that it was composed from.
        givers: place among `words` -> who gave that one, where it is not the command line.
        promised: the keys of the weights that the stages before it will set, which are not there yet.
    """

    cfg: RunConfig
    words: list[str]
    givers: Mapping[int, str] = field(default_factory=dict)
    promised: frozenset[str] = frozenset()


@dataclass
class Examined:
    """A task that is looked at; what several checks need is worked out once.

    Attributes:
        name: the task's, or of its stage in a pipeline.
        run: the doctor's.
        shows_all_keys: whether the terminal gets every value of the config.
    """

    name: str
    wanted: Wanted
    run: Run
    layout: Layout
    shows_all_keys: bool = False

    @cached_property
    def cfg(self) -> RunConfig:
        """Its config, by which nothing is fetched."""
        cfg = copy.deepcopy(self.wanted.cfg)
        cfg.paths.offline = True
        return cfg

    @property
    def words(self) -> list[str]:
        """The overrides that it was composed from."""
        return self.wanted.words

    @property
    def givers(self) -> Mapping[int, str]:
        """Who gave which of `words`."""
        return self.wanted.givers

    @property
    def promised(self) -> frozenset[str]:
        """Weights that earlier stages will make."""
        return self.wanted.promised

    @property
    def device(self) -> str:
        """Where it would compute."""
        return self.run.context.device

    @property
    def task_class(self) -> Any:
        """The class that does the task."""
        return TASKS.get(self.cfg.task.kind)

    @property
    def trains(self) -> bool:
        """Whether weights are changed."""
        return trains(self.cfg.task)

    @property
    def stage(self) -> str | None:
        """Which model it has; None: none."""
        return stage_of(self.cfg)

    @property
    def weight_keys(self) -> list[str]:
        """The keys of the weights that it starts from."""
        return self.task_class.weight_keys(self.cfg) if hasattr(self.task_class, "weight_keys") else []

    @cached_property
    def absent_weights(self) -> dict[str, str]:
        """Key -> what is said of weights that the config names, and that are not here."""
        found = {}
        for key in set(self.weight_keys) - self.promised:
            value = value_of(self.cfg.model, key)
            try:
                if value is not None:
                    Weights(self.cfg.model, self.cfg.paths, None).locate(value, key)
            except UserError as error:
                found[key] = sentence(error)
        return found

    @cached_property
    def source(self) -> Source:
        """The data set."""
        return build_source(self.cfg)

    @cached_property
    def texts(self) -> Texts:
        """Lengths of texts, and vocabularies."""
        return texts_of(self.cfg)

    @cached_property
    def tokenizers(self) -> dict[str, TextTokenizer | None]:
        """Part -> tokenizer, None: not here; those that the task uses."""
        wanted = {"language": ["language"], "stage1": ["qformer"], "stage2": ["language"], "answering": ["qformer", "language"]}
        cfg = copy.deepcopy(self.cfg)
        for key in self.absent_weights:
            (cfg.model if key == "model.weights" else getattr(cfg.model, key.split(".")[1])).weights = None
        weights = self.task_class.weights(cfg, self.promised)
        loader = ModelLoader(weights, texts=lambda: self.source.texts(), say=lambda text: None)
        found: dict[str, TextTokenizer | None] = {}
        for part in wanted.get(self.stage, []):
            if part == "qformer" and self.stage == "answering" and weights.texts_folder():
                found[part] = loader.question_tokenizer()
            else:
                found[part] = loader.own_tokenizer(part, fetch=getattr(cfg.model, part).tokenizer == "dataset")
        return found

    @cached_property
    def predicted(self) -> tuple[Prediction, nn.Layer]:
        """The memory of a training's step on one rank, and its model, without memory."""
        return prediction_of(self.cfg, self.layout, self.texts)

    @cached_property
    def model(self) -> nn.Layer:
        """The model as one rank holds it, without memory."""
        if self.trains:
            return self.predicted[1]
        return model_of(self.cfg, self.layout, self.texts.vocab_sizes, label_classes(self.cfg))


def value_of(model: ModelConfig, key: str) -> str | None:
    """That of the key of some weights, e.g. "model.vision.weights"."""
    *part, name = key.split(".")[1:]
    return getattr(getattr(model, part[0]) if part else model, name)


def layout_of(cfg: RunConfig, task: DoctorConfig) -> Layout:
    """How many ranks there are, and how they share the work."""
    return Layout.of(cfg, task.world_size or started_processes())


def looked_at(task: DoctorConfig) -> dict[str, Wanted]:
    """Every task of the command by name, of a pipeline its stages.

    Raises:
        UserError: a config is wrong.
    """
    words = inner_overrides(task.words)
    chosen = [f"task={task.of}"] if task.of else []
    words = [*words, *chosen, *task.overrides]
    cfg = compose_config(words)
    if not isinstance(cfg.task, PipelineConfig):
        return {cfg.task.kind: Wanted(cfg, words)}
    found, promised = {}, set()
    for stage in plan_stages(cfg.task):
        shared = list(stage.shared)
        givers = {len(shared) + place: "the pipeline's stage" for place in range(len(stage.own))}
        config = stage.config({})
        kind = TASKS.get(config.task.kind)
        given = frozenset(stage.given(promised))
        found[stage.name] = Wanted(config, [*shared, *stage.own], givers, given)
        promised |= kind.promises(config) if hasattr(kind, "promises") else set()
    return found


def examined_of(task: DoctorConfig, run: Run) -> list[Examined]:
    """As `looked_at`, ready for the checks: nothing will be fetched for them."""
    found = []
    for name, wanted in looked_at(task).items():
        layout = layout_of(wanted.cfg, task)
        found.append(Examined(name, wanted, run, layout, task.keys is KeysShown.all))
    return found
