"""What is measured: a task's own config at the sizes of the benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from blip2x.config.compose import compose_config, inner_overrides
from blip2x.config.run import RunConfig
from blip2x.config.task import DecodingConfig, trains
from blip2x.config.tools import BenchmarkConfig

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
        return trains(self.cfg.task)

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
    """The task `name` as `task` says, but for `sizes`, which are called as the curves are.

    Raises:
        UserError: the config that comes out is wrong, e.g. a text longer than the model's positions.
    """
    own = {"batch": "batch_size", "text_length": "text_length", "new_tokens": "new_tokens", "images": "images"}
    task = replace(task, **{own[size]: value for size, value in sizes.items() if size in own})
    if "batch" in sizes:
        task = replace(task, images=None)  # else there would be as many as before, in other batches
    words = [*inner_overrides(task.words), f"task={name}", f"task.eval_batch_size={task.batch_size}"]
    is_training = name.startswith("pretrain")
    if name in (*DECODES, "retrieval"):
        words += [f"dataset.eval_limit={task.images or task.batch_size * data_size}"]
    if is_training:
        words += [f"task.batch_size={task.batch_size}"]
    if name == "pretrain_stage1":
        words += ["task.contrast_steps=0"]
    if not task.data:
        words += ["dataset.num_workers=0"]
        words += [f"task.max_txt_len={task.text_length}"] if name != "vqa_zeroshot" else []
        words += [f"task.eval_max_txt_len={task.text_length}"] if name == "retrieval" else []
    if name in DECODES:
        words += [f"task.num_beams={task.num_beams}"] if task.num_beams else []
        words += [f"task.max_new_tokens={task.new_tokens}"] if task.new_tokens else []
    if "queries" in sizes:
        words += [f"model.qformer.num_queries={sizes['queries']}"]
    cfg = compose_config([*words, *task.overrides])
    if "image_tokens" in sizes:
        cfg.model.vision.image_size = math.isqrt(sizes["image_tokens"]) * cfg.model.vision.patch_size
    if isinstance(cfg.task, DecodingConfig):  # as many tokens in each run, whatever the weights would say
        cfg.task.min_new_tokens = cfg.task.max_new_tokens
    return Job(task, cfg)
