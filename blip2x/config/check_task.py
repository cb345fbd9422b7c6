"""Settings of a task that are impossible, alone or beside the model's."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from blip2x.config.model import ModelConfig, OptConfig
from blip2x.config.rules import AT_LEAST_1, AT_LEAST_3, NOT_NEGATIVE, POSITIVE, SHARE, choices, numbers
from blip2x.config.task import (
    AnsweringConfig,
    CaptionConfig,
    DecodingConfig,
    PipelineConfig,
    PretrainLanguageConfig,
    PretrainStage1Config,
    PretrainStage2Config,
    RetrievalConfig,
    TaskConfig,
    TrainingConfig,
    ValidationConfig,
    VqaFinetuneConfig,
    WeightsType,
    trains,
)
from blip2x.config.tools import (
    BenchmarkConfig,
    ConvertConfig,
    DoctorConfig,
    ExtractFeaturesConfig,
    FeatureMode,
    PredictConfig,
    PrepareConfig,
    ServeConfig,
)
from blip2x.errors import UserError
from blip2x.registry import TASKS

BENCHMARKS = ("pretrain_stage1", "pretrain_stage2", "caption", "vqa_zeroshot", "retrieval")
CAPTION_METRICS = ("BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE")


def check_task(task: TaskConfig) -> None:
    """Raise `UserError` where a setting of the task is out of range, or contradicts another one."""
    if isinstance(task, TrainingConfig):
        _check_training(task)
    elif hasattr(task, "eval_batch_size"):
        numbers("task", task, AT_LEAST_1, "eval_batch_size")
    if isinstance(task, DecodingConfig):
        _check_decoding(task)
    if isinstance(task, PretrainStage1Config):
        numbers("task", task, NOT_NEGATIVE, "itc_weight", "itm_weight", "lm_weight", "contrast_steps")
        numbers("task", task, SHARE, "label_smoothing")
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
        numbers("task", task, AT_LEAST_1, "k_test", "pair_batch_size")
        numbers("task", task, NOT_NEGATIVE, "patch_memory_gb")
        numbers("task", task, AT_LEAST_3, "eval_max_txt_len")
    if isinstance(task, CaptionConfig):
        choices("task.metrics", task.metrics, CAPTION_METRICS)
    if isinstance(task, VqaFinetuneConfig):
        numbers("task.validation", task.validation, AT_LEAST_1, "max_images", "num_beams")
    if isinstance(task, AnsweringConfig) and "{}" not in task.prompt:
        raise UserError(f"task.prompt={task.prompt!r} has no {{}}, so the question would not be asked; put {{}} in its place")
    if isinstance(task, PredictConfig):
        _check_predict(task)
    if isinstance(task, ExtractFeaturesConfig):
        _check_features(task)
    if isinstance(task, ConvertConfig):
        numbers("task", task, POSITIVE, "max_shard_gb")
    if isinstance(task, PrepareConfig):
        numbers("task", task, AT_LEAST_1, "parallel")
        numbers("task.links", task.links, AT_LEAST_1, "connections", "attempts", "max_side")
        numbers("task.links", task.links, POSITIVE, "timeout", "max_mb")
    if isinstance(task, PipelineConfig):
        _check_pipeline(task)
    if isinstance(task, DoctorConfig):
        numbers("task", task, AT_LEAST_1, "world_size")
        if task.of is not None:
            TASKS.check(task.of)
        if task.of == "doctor":
            raise UserError("task.of=doctor would look at itself; choose another task, e.g. task.of=pretrain_stage2")
        if not isinstance(task.steps, bool) and task.steps != "auto":
            raise UserError(f"task.steps must be true, false or auto, got {task.steps}")
    if isinstance(task, BenchmarkConfig):
        _check_benchmark(task)
    if isinstance(task, ServeConfig):
        _check_serve(task)


def _check_benchmark(task: BenchmarkConfig) -> None:
    known = [field.name for field in fields(task.sizes)]
    choices("task.of", task.of, BENCHMARKS)
    choices("task.curves", task.curves, tuple(known))
    if not task.of:
        raise UserError(f"task.of=[] measures nothing; choose of {', '.join(BENCHMARKS)}")
    for key in ("of", "curves"):
        names = getattr(task, key)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"task.{key} has {', '.join(twice)} more than once")
    numbers("task", task, AT_LEAST_1, "batch_size", "images", "questions", "new_tokens", "num_beams", "repeats")
    numbers("task", task, AT_LEAST_3, "text_length")
    numbers("task", task, NOT_NEGATIVE, "warmup")
    lists = {"task.matmul_sizes": task.matmul_sizes, **{f"task.sizes.{name}": getattr(task.sizes, name) for name in known}}
    for key, sizes in lists.items():
        if not sizes or min(sizes) < 1:
            raise UserError(f"{key} must be sizes of at least 1, got {sizes}")
    for name in task.curves:
        sizes = getattr(task.sizes, name)
        if len(sizes) < 2 or sizes != sorted(set(sizes)):
            raise UserError(f"task.sizes.{name} must be at least two sizes, rising, got {sizes}")
    if "image_tokens" in task.curves:
        for size in task.sizes.image_tokens:
            if math.isqrt(size) ** 2 != size:
                raise UserError(f"task.sizes.image_tokens: {size} patches form no square image; e.g. 64, 144 and 256 do")


def _check_validation(cfg: ValidationConfig) -> None:
    numbers("task.validation", cfg, AT_LEAST_1, "max_images", "num_beams", "max_new_tokens")
    numbers("task.validation", cfg, NOT_NEGATIVE, "min_new_tokens")
    if cfg.min_new_tokens > cfg.max_new_tokens:
        raise UserError(
            f"task.validation.min_new_tokens={cfg.min_new_tokens} is more than "
            f"task.validation.max_new_tokens={cfg.max_new_tokens}"
        )


def _check_predict(task: PredictConfig) -> None:
    choices("task.stage", [task.stage], (1, 2))
    numbers("task", task, AT_LEAST_1, "chat_tokens")
    if task.inputs is not None or task.prompts is None:
        task.inputs = _inputs(task.inputs)
    if not task.formats:
        raise UserError("task.formats=[] would write nothing; choose of jsonl, csv and html")
    if task.stage == 1 and (task.prompt.strip() or task.prompts is not None):
        key, value = ("prompt", repr(task.prompt)) if task.prompt.strip() else ("prompts", task.prompts)
        raise UserError(f"task.{key}={value} with task.stage=1: the Q-Former takes no prompt; leave it out")
    if task.prompts is None and "{}" in task.prompt:
        raise UserError(
            f"task.prompt={task.prompt!r} has {{}}, but there is no question to put there; write it into the prompt, or put "
            "questions into a file, task.prompts=FILE"
        )
    if task.prompts is not None and task.prompt.strip() and "{}" not in task.prompt:
        raise UserError(
            f"task.prompt={task.prompt!r} has no {{}} for the prompts of task.prompts={task.prompts}; put {{}} where they "
            "belong, or leave it empty"
        )
    if task.chat and task.prompts is None:
        raise UserError(
            "task.chat=true needs the questions to ask one after the other; put them into a file, task.prompts=FILE"
        )
    if task.chat and "{}" not in task.prompt:
        raise UserError(
            "task.chat=true needs a form to write questions and answers in, with {} for the question; set "
            "task.prompt='Question: {} Answer:'"
        )


def _check_serve(task: ServeConfig) -> None:
    choices("task.stage", [task.stage], (1, 2))
    numbers("task", task, AT_LEAST_1, "answer_max_new_tokens", "max_queue", "max_images")
    numbers("task", task, AT_LEAST_1, "limit_new_tokens", "limit_prompt_tokens", "limit_beams")
    numbers("task", task, POSITIVE, "max_seconds", "max_upload_mb", "max_images_mb")
    numbers("task", task, ("finite", math.isfinite), "answer_length_penalty")
    numbers("task", task, ("from 0 to 65535", lambda value: 0 <= value <= 65535), "port")
    if not task.host.strip():
        raise UserError("task.host is empty; give an address of this machine, e.g. task.host=127.0.0.1")
    if task.stage == 1 and task.prompt.strip():
        raise UserError(f"task.prompt={task.prompt!r} with task.stage=1: the Q-Former takes no prompt; leave it empty")
    if "{}" not in task.question_prompt:
        raise UserError(
            f"task.question_prompt={task.question_prompt!r} has no {{}}, so the question would not be asked; "
            "put {} in its place"
        )
    limits = {"max_new_tokens": "limit_new_tokens", "answer_max_new_tokens": "limit_new_tokens", "num_beams": "limit_beams"}
    for name, limit in {**limits, "num_return_sequences": "limit_beams"}.items():
        if getattr(task, name) > getattr(task, limit):
            raise UserError(f"task.{name}={getattr(task, name)} is more than task.{limit}={getattr(task, limit)}")


def _check_features(task: ExtractFeaturesConfig) -> None:
    numbers("task", task, AT_LEAST_1, "shard_size")
    numbers("task", task, AT_LEAST_3, "max_txt_len")
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
    numbers("task", task, AT_LEAST_1, *counts, "keep_last")
    numbers("task", task, NOT_NEGATIVE, "keep_best")
    if task.keep_best and task.best_metric is None:
        raise UserError(
            f"task.keep_best={task.keep_best} without task.best_metric: say by which metric; or set task.keep_best=0"
        )
    if hasattr(task, "max_txt_len"):
        numbers("task", task, AT_LEAST_3, "max_txt_len")


def _check_decoding(task: DecodingConfig) -> None:
    """Ranges; which options go together is said by `GenerationSettings`."""
    numbers("task", task, AT_LEAST_1, "num_beams", "max_new_tokens", "num_return_sequences")
    numbers("task", task, NOT_NEGATIVE, "top_k", "min_new_tokens")
    numbers("task", task, POSITIVE, "temperature", "repetition_penalty")
    numbers("task", task, ("above 0 and at most 1", lambda value: 0 < value <= 1), "top_p")
    numbers("task", task, ("finite", math.isfinite), "length_penalty")
    if task.weights_dtype is not WeightsType.float32 and trains(task):
        raise UserError(
            f"task.weights_dtype={task.weights_dtype.value} is for writing texts only, and task.train=true trains "
            "through these weights; set task.weights_dtype=float32, or evaluate in a run of its own"
        )
    if task.min_new_tokens > task.max_new_tokens:
        raise UserError(f"task.min_new_tokens={task.min_new_tokens} is more than task.max_new_tokens={task.max_new_tokens}")


def check_lengths(task: TaskConfig, model: ModelConfig) -> None:
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
    if isinstance(task, (PredictConfig, ServeConfig)) and task.stage == 1:
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
    if isinstance(task, DecodingConfig) and not (isinstance(task, (PredictConfig, ServeConfig)) and task.stage == 1):
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
