"""Several tasks in a row, each as it would be typed alone; weights go from one to the next."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf
from rich.rule import Rule

from blip2x.config.compose import OWN_KEYS, compose_config, compose_dict, compose_stored, inner_overrides, override_key, quoted
from blip2x.config.run import RunConfig
from blip2x.config.task import PipelineConfig, StageConfig
from blip2x.engine.progress import show_place
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import TASKS

_OF_ALL_STAGES = ("parallelism", "precision", "device", "threads", "logger", "paths", "seed")  # one process, one run folder
STAGES_FILE = "stages.json"  # in the run folder: each stage's whole config, without the weights of earlier stages
_DONE = "done.json"  # in a stage's folder: its metrics and weights


@dataclass
class Stage:
    """A stage that will run: its name, the overrides that all stages share and its own.

    One of a run that is repeated has the config that it had then, which its own overrides are in.
    """

    name: str
    shared: list[str]
    own: list[str]
    stored: dict[str, Any] | None = None
    source: Path | None = None  # the file of `stored`

    def config(self, handed: dict[str, str]) -> RunConfig:
        """The stage's config with the weights that earlier stages made; they win over the shared ones, not over the stage's."""
        given = self.given(handed)
        words = [f"{key}={quoted(path)}" for key, path in handed.items() if key in given]
        if self.stored is not None:
            own = {override_key(word) for word in self.own}
            shared = [word for word in self.shared if override_key(word) not in own]
            return compose_stored(self.stored, [*shared, *words], self.source)
        return compose_config([*self.shared, *words, *self.own])

    def given(self, keys: Collection[str]) -> set[str]:
        """Those of the earlier stages' weights, by config key, that this stage takes: not what its own overrides set.

        The Q-Former of an earlier stage 1 belongs to the whole model that is handed on, and is not given beside another one.
        """
        own = {override_key(word) for word in self.own}
        return set(keys) - own - ({"model.qformer.weights"} if "model.weights" in own else set())


def plan_stages(task: PipelineConfig, repeated: str | None = None) -> list[Stage]:
    """The stages of `task` that run, each with the overrides of all; the ones whose `unless` key is set are left out.

    Where `repeated` is a run folder, its stages, as they were.

    Raises:
        UserError: `unless` names no key of the config, or a stage sets what holds for all of them; or `repeated` does not say
            what its stages were.
    """
    if repeated:
        return _stages_of(Path(repeated), task)
    shared = inner_overrides(task.overrides)
    plan = []
    for stage in task.stages:
        own = [f"task={stage.task}", *stage.overrides]
        for word in stage.overrides:
            if override_key(word).split(".")[0] in (*OWN_KEYS[1:], *_OF_ALL_STAGES):
                raise UserError(f"task.stages: {stage.task} has {word}, which all stages share; give it to the whole command")
        if stage.unless is None or not _is_set(stage, [*shared, *own]):
            plan.append(Stage(stage.name or stage.task, shared, own))
    return plan


def _stages_of(folder: Path, task: PipelineConfig) -> list[Stage]:
    path = folder / STAGES_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        own = {stage.name or stage.task: stage.overrides for stage in task.stages}
        return [Stage(name, inner_overrides(task.overrides), own[name], config, path) for name, config in stored.items()]
    except FileNotFoundError:
        reason = "is not there"
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = f"is damaged ({type(error).__name__}: {error})"
    raise UserError(
        f"{path} {reason}, so what this pipeline's stages were is not known; type the command in {folder}/command.txt"
    )


def _is_set(stage: StageConfig, overrides: list[str]) -> bool:
    value = compose_dict(overrides)
    for part in stage.unless.split("."):
        if not isinstance(value, DictConfig) or part not in value:
            raise UserError(f"task.stages: {stage.task} has unless={stage.unless}, which is no key of the config")
        value = value[part]
    return value is not None


@TASKS.register("pipeline")
class Pipeline:
    """Compose and check every stage, then run them one after the other."""

    computes: ClassVar[bool] = True

    def __init__(self, cfg: RunConfig, run: Run):
        self.run_folder = run
        self.seed = cfg.seed
        self.stages = plan_stages(cfg.task, cfg.run)

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Find what is wrong with any stage before the first one starts.

        Raises:
            UserError: a stage's config, data or weights cannot be used.
        """
        promised: set[str] = set()
        maker: Stage | None = None  # the last one that hands on a whole model, and its task
        made_by = ""
        for stage in plan_stages(cfg.task, cfg.run):
            config = stage.config({})
            task, given = TASKS.get(config.task.kind), stage.given(promised)
            if not hasattr(task, "promises"):
                raise UserError(f"task.stages: {config.task.kind} is no stage of a pipeline; run it alone")
            start = task.starts_from(config)
            if maker and start and "model.weights" in given and made_by not in start.tasks:
                raise UserError(
                    f"task.stages: {stage.name} would start from the weights of {maker.name}, but task={config.task.kind} "
                    f"needs those of {start}; order the stages otherwise, or give this one its own by "
                    "overrides: ['model.weights=...']"
                )
            task.check(config, frozenset(given))
            promised |= task.promises(config)
            if "model.weights" in task.hands_on(config):
                maker, made_by = stage, config.task.kind

    def run(self) -> TaskResult:
        """Run all stages; the result has each stage's metrics, and the weights that the stages made."""
        handed: dict[str, str] = {}
        results: dict[str, dict[str, float]] = {}
        if not self.run_folder.path(STAGES_FILE).is_file():
            configs = {stage.name: OmegaConf.structured(stage.config({})) for stage in self.stages}
            resolved = {name: OmegaConf.to_container(cfg, resolve=True, enum_to_str=True) for name, cfg in configs.items()}
            self.run_folder.write_json(resolved, STAGES_FILE)
        for number, stage in enumerate(self.stages, 1):
            self.run_folder.console.print(Rule(f"{number}/{len(self.stages)}  {stage.name}", align="left"))
            show_place(self.run_folder.console, number, len(self.stages))
            result = self._run_stage(stage, handed)
            handed |= {key: str(path) for key, path in result.weights.items()}
            results[stage.name] = result.metrics
            self.run_folder.write_json(results, "results.json")  # what is done stays, whatever comes
        return TaskResult(stages=results, weights={key: Path(path) for key, path in handed.items()})

    def _run_stage(self, stage: Stage, handed: dict[str, str]) -> TaskResult:
        """Run one stage; where a run is gone on with that had finished it, only give its result."""
        run = self.run_folder.child(stage.name)
        done = run.context.broadcast_object(run.read_json(_DONE)) if run.goes_on else None
        if done and all(Path(path).exists() for path in done["weights"].values()):
            run.console.print("done before", style="dim")
            return TaskResult(done["metrics"], {key: Path(path) for key, path in done["weights"].items()})
        seed_everything(self.seed, 0)  # whatever the stages before it have drawn, or were they only read
        config = stage.config(handed)
        result = TASKS.get(config.task.kind)(config, run).run()
        run.write_json({"metrics": result.metrics, "weights": {key: str(path) for key, path in result.weights.items()}}, _DONE)
        return result
