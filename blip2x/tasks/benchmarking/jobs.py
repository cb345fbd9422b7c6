"""What is measured: a task's own config at the sizes of the benchmark."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from blip2x.config.check_model import check_model
from blip2x.config.check_task import check_lengths, check_task
from blip2x.config.compose import compose_config, inner_overrides
from blip2x.config.dataset import Cache
from blip2x.config.run import RunConfig
from blip2x.config.tools import BenchmarkConfig

TRAINS = ("pretrain_stage1", "pretrain_stage2")
DECODES = ("caption", "vqa_zeroshot")


@dataclass(frozen=True)
class Job:
    """A task at certain sizes.

    Attributes:
        task: the benchmark's config, with these sizes.
        cfg: of the task that is measured.
    """

    task: BenchmarkConfig
    cfg: RunConfig

    @property
    def name(self) -> str:
        """The task's."""
        return self.cfg.task.kind

    @property
    def trains(self) -> bool:
        """Whether a step is one of the optimizer."""
        return self.name in TRAINS

    @property
    def decodes(self) -> bool:
        """Whether the language model writes."""
        return self.name in DECODES

    @property
    def reads_language(self) -> bool:
        """Whether there is a language model."""
        return self.decodes or self.name == "pretrain_stage2"

    def images(self, data_size: int) -> int:
        """Of a step of all `data_size` ranks that have different samples."""
        if self.trains:
            return self.cfg.task.batch_size * self.cfg.task.accumulate * data_size
        return self.task.images or self.task.batch_size * data_size


def job_of(task: BenchmarkConfig, name: str, data_size: int = 1, **sizes: int) -> Job:
    """The task `name` as `task` says, but for `sizes`, which are called as the curves are; `data_size` as in `Job.images`.

    Raises:
        UserError: the config that comes out is wrong, e.g. a text longer than the model's positions.
    """
    own = {"batch": "batch_size", "text_length": "text_length", "new_tokens": "new_tokens", "images": "images"}
    task = replace(task, **{own[size]: value for size, value in sizes.items() if size in own})
    if "batch" in sizes:
        task = replace(task, images=None)  # else there would be as many as before, in other batches
    words = (*inner_overrides(task.words), f"task={name}", *task.overrides)
    job = Job(task, copy.deepcopy(_composed(words)))
    cfg, model = job.cfg, job.cfg.model
    if "image_tokens" in sizes:
        model.vision.image_size = math.isqrt(sizes["image_tokens"]) * model.vision.patch_size
    if "queries" in sizes:
        model.qformer.num_queries = sizes["queries"]
    cfg.task.eval_batch_size = task.batch_size
    if job.trains:
        cfg.task.batch_size = task.batch_size
    else:
        cfg.dataset.eval_limit = job.images(data_size)
    if name == "pretrain_stage1":
        cfg.task.contrast_steps = 0  # all three losses
    if not task.data:
        cfg.dataset.num_workers, cfg.dataset.cache = 0, Cache.none
        for key in ("max_txt_len", "eval_max_txt_len"):
            if hasattr(cfg.task, key):
                setattr(cfg.task, key, task.text_length)
    if job.decodes:
        cfg.task.num_beams = task.num_beams or cfg.task.num_beams
        cfg.task.max_new_tokens = task.new_tokens or cfg.task.max_new_tokens
        cfg.task.min_new_tokens = cfg.task.max_new_tokens  # as many in each run, whatever the weights would say
    check_model(model)
    check_task(cfg.task)
    check_lengths(cfg.task, model)
    return job


@lru_cache(maxsize=16)
def _composed(words: tuple[str, ...]) -> RunConfig:
    """Composing takes most of a second, and a curve has many sizes of one task."""
    return compose_config(list(words))
