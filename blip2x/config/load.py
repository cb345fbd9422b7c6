"""From Hydra's composed dictionary to typed, checked dataclasses: every mistake is one sentence at start-up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip2x.config.auto import AUTO, auto_model, typed
from blip2x.config.dataset import DatasetConfig, ImageTextConfig, check_transform
from blip2x.config.model import LanguageConfig, ModelConfig, OptConfig, T5Config
from blip2x.config.run import HybridConfig, OptimConfig, RunConfig, WandbConfig
from blip2x.config.task import (
    AnsweringConfig,
    CaptionConfig,
    ConvertConfig,
    DecodingConfig,
    DoctorConfig,
    ExtractFeaturesConfig,
    FeatureMode,
    PipelineConfig,
    PredictConfig,
    PrepareConfig,
    PretrainLanguageConfig,
    PretrainStage1Config,
    PretrainStage2Config,
    PretrainVisionConfig,
    RetrievalConfig,
    TaskConfig,
    TrainingConfig,
    ValidationConfig,
    VqaFinetuneConfig,
    trains,
)
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

CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE")

Rule = tuple[str, Callable[[Any], bool]]  # ("at least 1", whether a number is)

AT_LEAST_1: Rule = ("at least 1", lambda value: value >= 1)
AT_LEAST_3: Rule = ("at least 3 (a first token, a word, an end)", lambda value: value >= 3)  # tokens of a text
NOT_NEGATIVE: Rule = ("at least 0 and finite", lambda value: 0 <= value < math.inf)  # nan is not, either
POSITIVE: Rule = ("above 0 and finite", lambda value: 0 < value < math.inf)
SHARE: Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)


def load_config(cfg: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Check `cfg` and return it as dataclasses.

    Args:
        cfg: composed by Hydra.
        overrides: what it was composed from; a pipeline keeps them for its stages.

    Raises:
        UserError: a value is missing, of the wrong type, of an unknown kind, or impossible, alone or beside another one.
    """
    if cfg.model.get("name") == AUTO:
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
    if isinstance(config.task, DoctorConfig) and config.task.words is None:
        config.task.words = list(overrides)
    _check_kinds(config)
    _numbers("", config, NOT_NEGATIVE, "seed")
    _numbers("", config, AT_LEAST_1, "threads")
    _check_dataset(config.dataset)
    check_model(config.model)
    _check_optim(config.optim)
    _numbers("precision", config.precision, POSITIVE, "loss_scale")
    _numbers("precision", config.precision, AT_LEAST_1, "loss_scale_steps")
    _check_task(config.task)
    _check_lengths(config.task, config.model)
    _check_layer_decay(config)
    _check_resume(config)
    if isinstance(config.parallelism, HybridConfig):
        _check_parallelism(config.parallelism)
        _check_shared(config.parallelism, config.task)
    if isinstance(config.logger, WandbConfig):
        _choices("logger.mode", [config.logger.mode], ("online", "offline"))
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


def _check_dataset(cfg: DatasetConfig) -> None:
    check_transform(cfg.transform)
    _numbers("dataset", cfg, AT_LEAST_1, "max_pixels", "eval_limit")
    _numbers("dataset", cfg, NOT_NEGATIVE, "num_workers")
    if isinstance(cfg, ImageTextConfig):
        for name, part in cfg.parts.items():
            _numbers(f"dataset.parts.{name}", part, POSITIVE, "weight")
            ANNOTATION_FORMATS.check(part.format)


def check_model(cfg: ModelConfig) -> None:
    """Raise `UserError` where a number of the model is impossible, alone or beside another one."""
    for name, part in (("vision", cfg.vision), ("qformer", cfg.qformer)):
        _numbers(f"model.{name}", part, AT_LEAST_1, "width", "depth", "num_heads", "mlp_width")
        _check_heads(f"model.{name}", part)
    _numbers("model.vision", cfg.vision, AT_LEAST_1, "image_size", "patch_size")
    _numbers("model.vision", cfg.vision, SHARE, "drop_path_rate")
    if cfg.vision.image_size % cfg.vision.patch_size:
        raise UserError(
            f"model.vision.image_size={cfg.vision.image_size} is not a multiple of "
            f"model.vision.patch_size={cfg.vision.patch_size}"
        )
    counts = ("num_queries", "cross_attention_every", "vocab_size", "max_positions", "embed_dim")
    _numbers("model.qformer", cfg.qformer, AT_LEAST_1, *counts)
    _numbers("model.qformer", cfg.qformer, SHARE, "dropout")
    _check_language(cfg.language)
    _numbers("model", cfg, POSITIVE, "temperature", "ln_vision_eps")


def _check_language(cfg: LanguageConfig) -> None:
    _numbers("model.language", cfg, AT_LEAST_1, "width", "num_heads", "mlp_width", "vocab_size")
    _numbers("model.language", cfg, SHARE, "dropout")
    if isinstance(cfg, OptConfig):
        _numbers("model.language", cfg, AT_LEAST_1, "depth", "max_positions")
        _check_heads("model.language", cfg)
    if isinstance(cfg, T5Config):
        counts = ("encoder_depth", "decoder_depth", "head_width", "relative_buckets", "relative_max_distance")
        _numbers("model.language", cfg, AT_LEAST_1, *counts)


def _check_heads(prefix: str, part: Any) -> None:
    if part.width % part.num_heads:
        raise UserError(f"{prefix}.width={part.width} is not a multiple of {prefix}.num_heads={part.num_heads}")


def _check_optim(cfg: OptimConfig) -> None:
    _numbers("optim", cfg, POSITIVE, "lr", "eps", "clip_grad_norm")
    _numbers("optim", cfg, NOT_NEGATIVE, "warmup_start_lr", "warmup_steps", "eta_min", "weight_decay")
    _numbers("optim", cfg, SHARE, "beta1", "beta2")
    _numbers("optim", cfg, ("above 0 and at most 1", lambda value: 0 < value <= 1), "layer_decay")
    if cfg.eta_min > cfg.lr:
        raise UserError(f"optim.eta_min={cfg.eta_min} is above optim.lr={cfg.lr}, so the rate would rise; lower optim.eta_min")


def _check_parallelism(cfg: HybridConfig) -> None:
    """Whether the degrees fit the number of processes is known when these have joined."""
    _choices("parallelism.sharding_stage", [cfg.sharding_stage], (0, 1, 2, 3))
    one_or_left: Rule = ("1 or more, or -1 for what the other degrees leave", lambda value: value == -1 or value >= 1)
    _numbers("parallelism", cfg, one_or_left, "dp", "sharding", "tp")
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


def _check_task(task: TaskConfig) -> None:
    if isinstance(task, TrainingConfig):
        _check_training(task)
    elif hasattr(task, "eval_batch_size"):
        _numbers("task", task, AT_LEAST_1, "eval_batch_size")
    if isinstance(task, DecodingConfig):
        _check_decoding(task)
    if isinstance(task, PretrainStage1Config):
        _numbers("task", task, NOT_NEGATIVE, "itc_weight", "itm_weight", "lm_weight", "contrast_steps")
        _numbers("task", task, SHARE, "label_smoothing")
        if not task.itc_weight + task.itm_weight + task.lm_weight:
            raise UserError("task.itc_weight, task.itm_weight and task.lm_weight are all 0, so there is nothing to learn")
        if task.cached_contrast and task.accumulate == 1:
            raise UserError(
                "task.cached_contrast=true does nothing with task.accumulate=1: it contrasts the micro-batches of a step with "
                "each other; raise task.accumulate, or set task.cached_contrast=false"
            )
    if isinstance(task, (PretrainStage1Config, PretrainStage2Config)):
        _check_validation(task.validation)
    if isinstance(task, RetrievalConfig):
        _numbers("task", task, AT_LEAST_1, "k_test", "pair_batch_size")
        _numbers("task", task, NOT_NEGATIVE, "patch_memory_gb")
        _numbers("task", task, AT_LEAST_3, "eval_max_txt_len")
    if isinstance(task, CaptionConfig):
        _choices("task.metrics", task.metrics, CAPTION_METRICS)
    if isinstance(task, VqaFinetuneConfig):
        _numbers("task.validation", task.validation, AT_LEAST_1, "max_images", "num_beams")
    if isinstance(task, AnsweringConfig) and "{}" not in task.prompt:
        raise UserError(f"task.prompt={task.prompt!r} has no {{}}, so the question would not be asked; put {{}} in its place")
    if isinstance(task, PredictConfig):
        _check_predict(task)
    if isinstance(task, ExtractFeaturesConfig):
        _check_features(task)
    if isinstance(task, ConvertConfig):
        _numbers("task", task, POSITIVE, "max_shard_gb")
    if isinstance(task, PrepareConfig):
        _numbers("task", task, AT_LEAST_1, "parallel")
        _numbers("task.links", task.links, AT_LEAST_1, "connections", "attempts", "max_side")
        _numbers("task.links", task.links, POSITIVE, "timeout", "max_mb")
    if isinstance(task, PipelineConfig):
        _check_pipeline(task)
    if isinstance(task, DoctorConfig):
        _numbers("task", task, AT_LEAST_1, "world_size")
        if task.of is not None:
            TASKS.check(task.of)
        if task.of == "doctor":
            raise UserError("task.of=doctor trains nothing; choose a task that does, e.g. task.of=pretrain_stage2")


def _check_validation(cfg: ValidationConfig) -> None:
    _numbers("task.validation", cfg, AT_LEAST_1, "max_images", "num_beams", "max_new_tokens")
    _numbers("task.validation", cfg, NOT_NEGATIVE, "min_new_tokens")
    if cfg.min_new_tokens > cfg.max_new_tokens:
        raise UserError(
            f"task.validation.min_new_tokens={cfg.min_new_tokens} is more than "
            f"task.validation.max_new_tokens={cfg.max_new_tokens}"
        )


def _check_predict(task: PredictConfig) -> None:
    _choices("task.stage", [task.stage], (1, 2))
    task.inputs = _inputs(task.inputs)
    if task.stage == 1 and task.prompt.strip():
        raise UserError(f"task.prompt={task.prompt!r} with task.stage=1: the Q-Former takes no prompt; leave it empty")
    if "{}" in task.prompt:
        raise UserError(
            f"task.prompt={task.prompt!r} has {{}}, but there is no question to put there; write it into the prompt"
        )


def _check_features(task: ExtractFeaturesConfig) -> None:
    _numbers("task", task, AT_LEAST_1, "shard_size")
    _numbers("task", task, AT_LEAST_3, "max_txt_len")
    if task.inputs is None:
        return
    task.inputs = _inputs(task.inputs)
    if task.mode is not FeatureMode.image:
        raise UserError(
            f"task.mode={task.mode.value} needs texts, and the pictures of task.inputs come without any; set task.mode=image, "
            "or task.inputs=null and a data set with captions"
        )


def _inputs(inputs: Any) -> list[str]:
    given = inputs if isinstance(inputs, list) else [inputs]
    if not given or any(isinstance(entry, (type(None), list, dict)) or not str(entry).strip() for entry in given):
        raise UserError(f"task.inputs={inputs}: give files, folders, patterns or web addresses, e.g. task.inputs=cat.jpg")
    return [str(entry) for entry in given]  # a file may be called 7


def _check_training(task: TrainingConfig) -> None:
    if (task.max_steps is None) == (task.max_epochs is None):
        raise UserError(
            "set one of task.max_steps and task.max_epochs and leave the other null, "
            f"got {task.max_steps} and {task.max_epochs}"
        )
    counts = ("batch_size", "accumulate", "log_every", "eval_batch_size", "max_steps", "max_epochs", "save_every", "eval_every")
    _numbers("task", task, AT_LEAST_1, *counts, "keep_last")
    _numbers("task", task, NOT_NEGATIVE, "keep_best")
    if task.keep_best and task.best_metric is None:
        raise UserError(
            f"task.keep_best={task.keep_best} without task.best_metric: say by which metric; or set task.keep_best=0"
        )
    if hasattr(task, "max_txt_len"):
        _numbers("task", task, AT_LEAST_3, "max_txt_len")


def _check_decoding(task: DecodingConfig) -> None:
    """Ranges; which options go together is said by `GenerationSettings`."""
    _numbers("task", task, AT_LEAST_1, "num_beams", "max_new_tokens", "num_return_sequences")
    _numbers("task", task, NOT_NEGATIVE, "top_k", "min_new_tokens")
    _numbers("task", task, POSITIVE, "temperature", "repetition_penalty")
    _numbers("task", task, ("above 0 and at most 1", lambda value: 0 < value <= 1), "top_p")
    _numbers("task", task, ("finite", math.isfinite), "length_penalty")
    if task.min_new_tokens > task.max_new_tokens:
        raise UserError(f"task.min_new_tokens={task.min_new_tokens} is more than task.max_new_tokens={task.max_new_tokens}")


def _check_lengths(task: TaskConfig, model: ModelConfig) -> None:
    """The longest text must have positions; else a run would stop at the first long one, perhaps days later."""
    of_qformer = {}
    if isinstance(task, PretrainStage1Config):
        of_qformer = {"max_txt_len": task.max_txt_len}
        if task.validation.captions:
            of_qformer["validation.max_new_tokens"] = task.validation.max_new_tokens
    if isinstance(task, RetrievalConfig):
        of_qformer["eval_max_txt_len"] = task.eval_max_txt_len
    if isinstance(task, ExtractFeaturesConfig) and task.mode is not FeatureMode.image:
        of_qformer["max_txt_len"] = task.max_txt_len
    if isinstance(task, PredictConfig) and task.stage == 1:
        of_qformer = {"max_new_tokens": task.max_new_tokens}
    if isinstance(task, VqaFinetuneConfig):
        of_qformer["max_txt_len"] = task.max_txt_len
    for name, length in of_qformer.items():
        if length > model.qformer.max_positions:
            raise UserError(f"task.{name}={length} is more than model.qformer.max_positions={model.qformer.max_positions}")
    if not isinstance(model.language, OptConfig):  # T5 has no limit
        return
    lengths = {}
    reads = (PretrainLanguageConfig, PretrainStage2Config, CaptionConfig, VqaFinetuneConfig)
    if isinstance(task, reads) and trains(task):
        lengths["max_txt_len"] = task.max_txt_len
    if isinstance(task, DecodingConfig) and not (isinstance(task, PredictConfig) and task.stage == 1):
        lengths["max_new_tokens"] = task.max_new_tokens
    if isinstance(task, PretrainStage2Config) and task.validation.captions:
        lengths["validation.max_new_tokens"] = task.validation.max_new_tokens
    queries = 0 if isinstance(task, PretrainLanguageConfig) else model.qformer.num_queries
    for name, length in lengths.items():
        if queries + length > model.language.max_positions:
            raise UserError(
                f"task.{name}={length}{f' and {queries} queries' if queries else ''} make more than "
                f"model.language.max_positions={model.language.max_positions}"
            )


def _check_pipeline(task: PipelineConfig) -> None:
    if not task.stages:
        raise UserError("task.stages is empty; a pipeline needs at least one stage, e.g. task.stages=[{task: caption}]")
    names = [stage.name or stage.task for stage in task.stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"task.stages has {', '.join(twice)} more than once; give each stage a name of its own (name: ...)")
    for name in names:
        if name in ("", ".", "..") or PurePath(name).name != name:
            raise UserError(f"task.stages: the name {name!r} has to be a plain folder name, without slashes")
    for stage in task.stages:
        TASKS.check(stage.task)
        if stage.task == "pipeline":
            raise UserError("task.stages: a pipeline cannot be a stage of a pipeline")


def _numbers(prefix: str, cfg: Any, rule: Rule, *names: str) -> None:
    """Hold the numbers `names` of `cfg` to `rule`; null, where the schema allows it, is no number."""
    what, holds = rule
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not holds(value):
            raise UserError(f"{f'{prefix}.{name}'.lstrip('.')} must be {what}, got {value}")


def _choices(key: str, values: list, known: tuple) -> None:
    for value in values:
        if value not in known:
            raise UserError(f"{key}: unknown value {value!r}; known: {', '.join(map(str, known))}")
