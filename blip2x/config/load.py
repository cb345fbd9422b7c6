"""From Hydra's composed dictionary to typed, checked dataclasses: every mistake is one sentence at start-up."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip2x.config.auto import AUTO, auto_model, typed
from blip2x.config.check_model import check_model
from blip2x.config.check_task import check_lengths, check_task
from blip2x.config.dataset import Cache, DatasetConfig, ImageTextConfig, check_transform
from blip2x.config.logger import check_loggers
from blip2x.config.model import VisionConfig
from blip2x.config.rules import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, SHARE, Rule, choices, numbers
from blip2x.config.run import HybridConfig, OptimConfig, RunConfig
from blip2x.config.task import (
    PipelineConfig,
    PretrainLanguageConfig,
    PretrainStage1Config,
    PretrainVisionConfig,
    TaskConfig,
    TrainingConfig,
    may_keep_features,
    trains,
)
from blip2x.config.tools import BenchmarkConfig, CompareConfig, DoctorConfig, ExtractFeaturesConfig
from blip2x.errors import UserError
from blip2x.registry import (
    ANNOTATION_FORMATS,
    DATASETS,
    LANGUAGE_MODELS,
    LOGGERS,
    STRATEGIES,
    TASKS,
    VISION_ENCODERS,
    WEIGHT_READERS,
)


def load_config(cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Check `cfg` and return it as dataclasses.

    Args:
        cfg: composed by Hydra.
        overrides: what it was composed from; a pipeline keeps them for its stages.

    Raises:
        UserError: a value is missing, of the wrong type, of an unknown kind, or impossible, alone or beside another one.
    """
    if cfg.model.get("name") == AUTO and OmegaConf.get_type(cfg.model.vision) is VisionConfig:  # not of a run that is repeated
        cfg = _auto(cfg)
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}; give one, e.g. {missing[0]}=...")
    try:
        config: RunConfig = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"config key {error.full_key}: {error.msg}") from error
    if isinstance(config.task, PipelineConfig) and config.task.overrides is None:
        config.task.overrides = list(overrides)
    if isinstance(config.task, (BenchmarkConfig, DoctorConfig)) and config.task.words is None:
        config.task.words = list(overrides)
    _check_kinds(config)
    numbers("", config, NOT_NEGATIVE, "seed")
    numbers("", config, AT_LEAST_1, "threads")
    _check_dataset(config.dataset)
    check_model(config.model)
    _check_optim(config.optim)
    numbers("precision", config.precision, POSITIVE, "loss_scale")
    numbers("precision", config.precision, AT_LEAST_1, "loss_scale_steps")
    _check_sweep(config)
    check_task(config.task)
    check_lengths(config.task, config.model)
    _check_cache(config)
    _check_layer_decay(config)
    _check_resume(config)
    _check_runs(config)
    if isinstance(config.parallelism, HybridConfig):
        _check_parallelism(config.parallelism)
        _check_shared(config.parallelism, config.task)
    check_loggers(config.logger)
    return config


def _auto(cfg: DictConfig) -> DictConfig:
    """With the model that the weights are of, which are fetched where they are not there."""
    if OmegaConf.is_missing(cfg.model, "weights") or cfg.model.weights is None:
        raise UserError("model=auto takes its shape from weights; set model.weights, or choose another model")
    given = typed(cfg.model)
    described, heads = WEIGHT_READERS.get("auto")(given, Path(cfg.paths.weights), offline=cfg.paths.offline)
    cfg = copy.deepcopy(cfg)
    OmegaConf.set_readonly(cfg, False)
    cfg.model = auto_model(given, described, heads)
    return cfg


def _check_resume(config: RunConfig) -> None:
    if config.resume == "auto":
        if config.run_name is None:
            raise UserError("resume=auto goes on with the run of that name: give run_name, e.g. run_name=mine resume=auto")
        if config.overwrite:
            raise UserError("resume=auto keeps what the run has done, overwrite=true deletes it; choose one of them")
    elif config.resume != "never":
        if not trains(config.task):
            evaluates = isinstance(config.task, TrainingConfig)
            what = "with task.train=false trains nothing" if evaluates else "is no single training"
            raise UserError(
                f"resume={config.resume}: task={config.task.kind} {what}; resume=auto, with the run_name of a "
                "run that was interrupted, works for all tasks"
            )
        if not Path(config.resume).is_dir():
            raise UserError(f"resume={config.resume} is no folder; give a run folder or a checkpoint, or auto, or never")


def _check_runs(config: RunConfig) -> None:
    """Only a comparison has any; there they become a list of texts."""
    if not isinstance(config.task, CompareConfig):
        if config.runs is not None:
            raise UserError(f"runs={config.runs} is what task=compare looks at; task={config.task.kind} takes none")
        return
    given = config.runs if isinstance(config.runs, list) else [config.runs]
    if not given or any(isinstance(entry, (type(None), list, dict)) or not str(entry).strip() for entry in given):
        raise UserError("task=compare needs runs: a folder of runs, a run, or a list of them, e.g. runs=outputs/sweeps/NAME")
    config.runs = [str(entry) for entry in given]  # a folder may be called 7


def _check_sweep(config: RunConfig) -> None:
    numbers("prune", config.prune, AT_LEAST_1, "min_runs")
    numbers("prune", config.prune, NOT_NEGATIVE, "min_step")
    for key, value in (("objective", config.objective), ("prune.metric", config.prune.metric)):
        if value is not None and not all(value.partition(".")):
            raise UserError(f"{key}={value} must be STAGE.METRIC, e.g. {key}=pretrain_stage1.loss")


def _check_kinds(config: RunConfig) -> None:
    for registry, kind in (
        (TASKS, config.task.kind),
        (DATASETS, config.dataset.kind),
        (VISION_ENCODERS, config.model.vision.kind),
        (LANGUAGE_MODELS, config.model.language.kind),
        (STRATEGIES, config.parallelism.kind),
        *((LOGGERS, logger.kind) for logger in config.logger.values()),
    ):
        registry.check(kind)


def _check_dataset(cfg: DatasetConfig) -> None:
    check_transform(cfg.transform)
    numbers("dataset", cfg, AT_LEAST_1, "max_pixels", "eval_limit", "crops")
    numbers("dataset", cfg, POSITIVE, "cache_gb")
    numbers("dataset", cfg, NOT_NEGATIVE, "num_workers")
    if isinstance(cfg, ImageTextConfig):
        for name, part in cfg.parts.items():
            numbers(f"dataset.parts.{name}", part, POSITIVE, "weight")
            ANNOTATION_FORMATS.check(part.format)


def _check_cache(config: RunConfig) -> None:
    """Whether features can be kept, by the tasks that do it."""
    dataset, task = config.dataset, config.task
    if dataset.cache is not Cache.features or not may_keep_features(task):
        return
    if trains(task) and not config.model.vision.frozen:
        raise UserError(
            "dataset.cache=features keeps what a frozen image encoder gives, and model.vision.frozen=false trains it; set "
            "dataset.cache=none"
        )
    if isinstance(config.parallelism, HybridConfig) and config.parallelism.tp > 1:
        raise UserError(
            f"dataset.cache=features is for ranks with samples of their own, and parallelism.tp={config.parallelism.tp} lets "
            "several work on the same; set parallelism.tp=1 or dataset.cache=none"
        )
    transform = dataset.transform
    if trains(task) and dataset.crops is None and (transform.crop_scale is not None or transform.flip):
        raise UserError(
            "dataset.cache=features needs training crops that come again, and dataset.crops=null draws new ones each epoch; "
            "set dataset.crops=1 (or more), or dataset.transform.crop_scale=null and dataset.transform.flip=false"
        )


def _check_optim(cfg: OptimConfig) -> None:
    numbers("optim", cfg, POSITIVE, "lr", "eps", "clip_grad_norm")
    numbers("optim", cfg, NOT_NEGATIVE, "warmup_start_lr", "warmup_steps", "eta_min", "weight_decay")
    numbers("optim", cfg, SHARE, "beta1", "beta2")
    numbers("optim", cfg, ("above 0 and at most 1", lambda value: 0 < value <= 1), "layer_decay")
    if cfg.eta_min > cfg.lr:
        raise UserError(f"optim.eta_min={cfg.eta_min} is above optim.lr={cfg.lr}, so the rate would rise; lower optim.eta_min")


def _check_parallelism(cfg: HybridConfig) -> None:
    """Whether the degrees fit the number of processes is known when these have joined."""
    choices("parallelism.sharding_stage", [cfg.sharding_stage], (0, 1, 2, 3))
    one_or_left: Rule = ("1 or more, or -1 for what the other degrees leave", lambda value: value == -1 or value >= 1)
    numbers("parallelism", cfg, one_or_left, "dp", "sharding", "tp")
    if cfg.tp_vision and cfg.tp == 1:
        raise UserError("parallelism.tp_vision=true, but parallelism.tp=1 shares with nobody; set parallelism.tp to 2 or more")


def _check_shared(cfg: HybridConfig, task: TaskConfig) -> None:
    """Tensor parallelism is of frozen models, and trains nothing faster where the task has none."""
    of_stage1 = isinstance(task, (PretrainStage1Config, ExtractFeaturesConfig))
    without_language = of_stage1 or isinstance(task, (PretrainVisionConfig, PretrainLanguageConfig))
    if cfg.tp == 1 or not without_language or (of_stage1 and cfg.tp_vision):
        return
    vision = ", or share the image encoder with parallelism.tp_vision=true" if of_stage1 else ""
    raise UserError(
        f"parallelism.tp={cfg.tp}: task={task.kind} has no frozen language model that ranks could share, and all of them would "
        f"do the same; use parallelism=dp{vision}"
    )


def _check_layer_decay(config: RunConfig) -> None:
    """Without a trained image encoder it would do nothing."""
    task, vision = config.task, config.model.vision
    if config.optim.layer_decay == 1 or not trains(task) or isinstance(task, PretrainVisionConfig):
        return
    if vision.frozen or isinstance(task, PretrainLanguageConfig):
        raise UserError(
            f"optim.layer_decay={config.optim.layer_decay} is for a trained image encoder, which task={task.kind} does not "
            f"train{' with model.vision.frozen=true' if vision.frozen else ''}; set optim.layer_decay=1"
        )
