"""What speaks against measuring a job, found before anything is measured."""

from __future__ import annotations

import os

import paddle

from blip2x.config.compose import override_key
from blip2x.config.model import OptConfig
from blip2x.config.tools import BenchmarkConfig
from blip2x.engine.memory import free_memory
from blip2x.engine.memory_table import amount
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout
from blip2x.parallel.devices import started_processes
from blip2x.registry import TASKS
from blip2x.tasks.benchmarking.jobs import Job
from blip2x.tasks.benchmarking.models import has_weights
from blip2x.tasks.checkup.memory import Texts, model_of, prediction_of, rank_count, ranks_here, stored_bytes
from blip2x.tasks.common.features import count_images
from blip2x.tasks.common.inputs import build_source

_WORDS = 1000  # about as many as a tokenizer has that is made of a data set's texts
_BESIDE = 2**30  # bytes of libraries and of a batch, where nothing is predicted


_OWN = {  # keys that a measured task gets from the benchmark -> what says how
    "task": "task.of",
    "task.batch_size": "task.batch_size",
    "task.eval_batch_size": "task.batch_size",
    **dict.fromkeys(("task.contrast_steps", "task.itm_weight", "task.lm_weight"), "nothing: all losses are measured"),
    "task.min_new_tokens": "task.new_tokens",
    "dataset.eval_limit": "task.images",
}
_OF_THE_COMMAND = ("device", "threads", "parallelism", "precision", "seed")  # by which all tasks are measured alike
_OWN_IF_SET = {"new_tokens": "max_new_tokens", "num_beams": "num_beams"}  # the benchmark's -> the measured task's
_OWN_MADE_UP = {
    "task.max_txt_len": "task.text_length",
    "task.eval_max_txt_len": "task.text_length",
    "dataset.num_workers": "nothing: made-up pictures need no loading",
    "dataset.cache": "nothing: made-up pictures are not kept",
}


def check_overrides(task: BenchmarkConfig) -> None:
    """Raise `UserError` where `task.overrides` sets what would be overwritten, or what one process has once."""
    own = {f"task.{ours}": f"task.{key}" for key, ours in _OWN_IF_SET.items() if getattr(task, key) is not None}
    own |= _OWN if task.data else _OWN | _OWN_MADE_UP
    for word in task.overrides:
        key = override_key(word)
        if (first := key.split(".")[0]) in _OF_THE_COMMAND:
            raise UserError(
                f"task.overrides has {word}, but {first} is the same for all that is measured; set it beside task=benchmark"
            )
        if key in own:
            raise UserError(f"task.overrides has {word}, but the benchmark sets {key} of what it measures, by {own[key]}")


def check_job(job: Job, data_ranks: int = 1) -> None:
    """Raise `UserError` where weights or data are missing or too few, texts too long for the model, or memory too small.

    `data_ranks` have different samples.
    """
    _check_lengths(job)
    if has_weights(job.cfg):
        TASKS.get(job.name).check_weights(job.cfg)
    if job.task.data:
        _check_samples(job, data_ranks)
    _check_memory(job)


def _check_samples(job: Job, data_ranks: int) -> None:
    kind, split = TASKS.get(job.name), "train" if job.trains else "eval"
    (what,) = {what for what, which in kind.reads(job.cfg) if which == split}
    samples = getattr(build_source(job.cfg), what)(split)
    kind.check_samples(job.cfg, split, samples)
    needed, there = job.images(data_ranks), len(samples)
    if job.trains:
        needed //= job.cfg.task.accumulate  # one batch of each rank: the next epoch goes on
    elif what == "questions":
        there = count_images(samples)
    if there < needed:
        raise UserError(
            f"task={job.name} is to be measured on {needed} images, and {job.cfg.dataset.name} has {there} in its split "
            f"{split}; lower task.{'batch_size' if job.trains else 'images'}, or take made-up ones with task.data=false"
        )


def _check_lengths(job: Job) -> None:
    language, queries, written = job.cfg.model.language, job.cfg.model.qformer.num_queries, 0
    if job.task.data or not job.reads_language or not isinstance(language, OptConfig):
        return
    if job.decodes:
        written = job.cfg.task.max_new_tokens
    read = max(written - 1, 0)  # of those that are written, all but the last
    if queries + job.task.text_length + read > language.max_positions:
        raise UserError(
            f"{job.name}: {queries} queries, task.text_length={job.task.text_length} and {written} new tokens make more than "
            f"model.language.max_positions={language.max_positions}"
        )


def _check_memory(job: Job) -> None:
    device, layout = paddle.get_device(), Layout.of(job.cfg, started_processes())
    here = ranks_here(rank_count(layout), os.environ) if device == "cpu" else 1
    shape, length = job.cfg.model, getattr(job.cfg.task, "max_txt_len", 0)
    words = {"qformer": shape.qformer.vocab_size or _WORDS, "language": shape.language.vocab_size or _WORDS}
    if job.trains:
        found, _ = prediction_of(job.cfg, layout, Texts(length, length if shape.language.kind == "t5" else 0, words))
        need = found.resident_elsewhere if device == "cpu" else found.peak  # no rank saves anything
    else:
        need = stored_bytes(model_of(job.cfg, layout, words, {})) + _BESIDE
    free, where = free_memory(device)
    if here * need > free:
        whose = f"{here} ranks need" if here > 1 else "a rank needs"
        raise UserError(
            f"{job.name} does not fit into memory: {whose} {amount(here * need)}, and {amount(free)} are free {where}; "
            "choose a smaller model, or lower task.batch_size"
        )
