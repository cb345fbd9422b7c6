"""What speaks against measuring a job, found before anything is measured."""

from __future__ import annotations

import os

import paddle

from blip2x.config.model import OptConfig
from blip2x.engine.memory import free_memory
from blip2x.engine.memory_table import amount
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout
from blip2x.parallel.devices import started_processes
from blip2x.registry import TASKS
from blip2x.tasks.benchmarking.jobs import Job
from blip2x.tasks.benchmarking.models import has_weights
from blip2x.tasks.checkup.memory import Texts, model_of, prediction_of, rank_count, ranks_here, stored_bytes
from blip2x.tasks.common.inputs import build_source

_WORDS = 1000  # about as many as a tokenizer has that is made of a data set's texts
_BESIDE = 2**30  # bytes of libraries and of a batch, where nothing is predicted


def check_job(job: Job) -> None:
    """Raise `UserError` where weights or data are missing, texts are too long for the model, or memory is too small."""
    _check_lengths(job)
    if has_weights(job.cfg):
        TASKS.get(job.name).check(job.cfg)
    elif job.task.data:
        for what, split in TASKS.get(job.name).reads(job.cfg):
            getattr(build_source(job.cfg), what)(split)
    _check_memory(job)


def _check_lengths(job: Job) -> None:
    language, queries, written = job.cfg.model.language, job.cfg.model.qformer.num_queries, 0
    if job.task.data or not job.reads_language or not isinstance(language, OptConfig):
        return
    if job.decodes:
        written = job.cfg.task.max_new_tokens
    if queries + job.task.text_length + written > language.max_positions:
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
