"""From Hydra's composed dictionary to typed, checked dataclasses: every mistake is one sentence at start-up."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip2x.config.dataset import check_transform
from blip2x.config.model import ModelConfig
from blip2x.config.run import HybridConfig, OptimConfig, RunConfig, WandbConfig
from blip2x.config.task import CaptionConfig, DecodingConfig, PipelineConfig, PredictConfig, TrainingConfig
from blip2x.errors import UserError
from blip2x.registry import DATASETS, LANGUAGE_MODELS, LOGGERS, STRATEGIES, TASKS, VISION_ENCODERS

CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr")


def load_config(cfg: DictConfig) -> RunConfig:
    """Check `cfg` and return it as dataclasses.

    Raises:
        UserError: a value is missing, of the wrong type, of an unknown kind, or impossible beside another one.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}; give one, e.g. {missing[0]}=...")
    try:
        config: RunConfig = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"config key {error.full_key}: {error.msg}") from error
    _check_kinds(config)
    check_transform(config.dataset.transform)
    _check_model(config.model)
    _check_optim(config.optim)
    if isinstance(config.task, TrainingConfig):
        _check_training(config.task)
    if isinstance(config.task, DecodingConfig):
        _positive("task", config.task, ["num_beams", "max_new_tokens", "num_return_sequences", "eval_batch_size"])
    if isinstance(config.task, CaptionConfig):
        _choices("task.metrics", config.task.metrics, CAPTION_METRICS)
    if isinstance(config.task, PredictConfig):
        _choices("task.stage", [config.task.stage], (1, 2))
    if isinstance(config.task, PipelineConfig):
        _check_pipeline(config.task)
    if isinstance(config.parallelism, HybridConfig):
        _choices("parallelism.sharding_stage", [config.parallelism.sharding_stage], (0, 1, 2, 3))
    if isinstance(config.logger, WandbConfig):
        _choices("logger.mode", [config.logger.mode], ("online", "offline"))
    return config


def _check_kinds(config: RunConfig) -> None:
    for registry, kind in (
        (TASKS, config.task.kind),
        (DATASETS, config.dataset.kind),
        (VISION_ENCODERS, config.model.vision.kind),
        (LANGUAGE_MODELS, config.model.language.kind),
        (STRATEGIES, config.parallelism.kind),
        (LOGGERS, config.logger.kind),
    ):
        registry.check(kind)


def _check_model(cfg: ModelConfig) -> None:
    for name, part in (("vision", cfg.vision), ("qformer", cfg.qformer)):
        _positive(f"model.{name}", part, ["width", "depth", "num_heads", "mlp_width"])
        if part.width % part.num_heads:
            raise UserError(f"model.{name}.width={part.width} is not a multiple of model.{name}.num_heads={part.num_heads}")
    if cfg.vision.image_size % cfg.vision.patch_size:
        raise UserError(
            f"model.vision.image_size={cfg.vision.image_size} is not a multiple of model.vision.patch_size={cfg.vision.patch_size}"
        )
    if cfg.temperature <= 0:
        raise UserError(f"model.temperature must be positive, got {cfg.temperature}")


def _check_optim(cfg: OptimConfig) -> None:
    if cfg.lr <= 0 or cfg.warmup_start_lr < 0 or cfg.eta_min < 0:
        raise UserError(f"optim.lr must be positive and warmup_start_lr, eta_min not negative, got {cfg.lr}, {cfg.warmup_start_lr}, {cfg.eta_min}")
    if not (0 <= cfg.beta1 < 1 and 0 <= cfg.beta2 < 1):
        raise UserError(f"optim.beta1 and optim.beta2 must be in [0, 1), got {cfg.beta1} and {cfg.beta2}")
    if cfg.clip_grad_norm is not None and cfg.clip_grad_norm <= 0:
        raise UserError(f"optim.clip_grad_norm must be positive or null, got {cfg.clip_grad_norm}")


def _check_training(task: TrainingConfig) -> None:
    if (task.max_steps is None) == (task.max_epochs is None):
        raise UserError(f"set one of task.max_steps and task.max_epochs and leave the other null, got {task.max_steps} and {task.max_epochs}")
    _positive("task", task, ["batch_size", "accumulate", "log_every", "eval_batch_size"])
    for name in ("max_steps", "max_epochs", "save_every"):
        if getattr(task, name) is not None:
            _positive("task", task, [name])


def _check_pipeline(task: PipelineConfig) -> None:
    if not task.stages:
        raise UserError("task.stages is empty; a pipeline needs at least one stage, e.g. task.stages=[{task: caption}]")
    names = [stage.name or stage.task for stage in task.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"task.stages has {', '.join(twice)} more than once; give each stage a name of its own (name: ...)")
    for stage in task.stages:
        TASKS.check(stage.task)
        if stage.task == "pipeline":
            raise UserError("task.stages: a pipeline cannot be a stage of a pipeline")


def _positive(prefix: str, cfg: object, names: list[str]) -> None:
    for name in names:
        if getattr(cfg, name) < 1:
            raise UserError(f"{prefix}.{name} must be at least 1, got {getattr(cfg, name)}")


def _choices(key: str, values: list, known: tuple) -> None:
    for value in values:
        if value not in known:
            raise UserError(f"{key}: unknown value {value!r}; known: {', '.join(map(str, known))}")
