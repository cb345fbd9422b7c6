"""The models that are measured: with the config's weights, or with random ones where it has none."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.run import Run
from blip2x.models.assemblies.stage1 import Stage1Model, build_stage1
from blip2x.models.assemblies.stage2 import Stage2Model, build_stage2
from blip2x.models.compact import compact_of
from blip2x.models.freeze import freeze
from blip2x.models.tensor_parallel import share_of
from blip2x.models.weights.checkpoint import fill
from blip2x.models.weights.stored import StoredTensor
from blip2x.tasks.benchmarking.jobs import Job
from blip2x.tasks.benchmarking.made_up import MadeUpTokenizer
from blip2x.tasks.common.models import ModelLoader

Model = Stage1Model | Stage2Model
_SCALE = 0.02  # standard deviation of random weights


def has_weights(cfg: RunConfig) -> bool:
    """Whether the config names any."""
    return any(part.weights is not None for part in (cfg.model, cfg.model.vision, cfg.model.qformer, cfg.model.language))


def build(job: Job, run: Run) -> tuple[Model, Any]:
    """The job's model in evaluation mode, its frozen parts frozen, and the tokenizer of the part that reads its texts.

    Raises:
        UserError: weights that are named cannot be had or do not fit, or a part cannot be split over the ranks.
    """
    loader = ModelLoader.of_run(job.cfg, run)
    job.cfg.model = loader.cfg  # what weights say of the model's shape
    if has_weights(job.cfg):
        model, tokenizer = loader.stage2(new_projection=not job.decodes) if job.reads_language else loader.stage1()
        return model, tokenizer if job.task.data else _made_up(job, tokenizer.vocab_size)
    tokenizer = _tokenizer(job, loader)
    return _random(job, loader, tokenizer.vocab_size), tokenizer


def _tokenizer(job: Job, loader: ModelLoader) -> TextTokenizer | MadeUpTokenizer:
    part = job.cfg.model.language if job.reads_language else job.cfg.model.qformer
    if not job.task.data and part.vocab_size:
        return _made_up(job, part.vocab_size)
    real = loader.language_tokenizer() if job.reads_language else loader.qformer_tokenizer()
    return real if job.task.data else _made_up(job, real.vocab_size)


def _made_up(job: Job, vocab_size: int) -> MadeUpTokenizer:
    family = job.cfg.model.language.kind if job.reads_language else "bert"
    return MadeUpTokenizer(family, vocab_size, job.task.text_length)


def _random(job: Job, loader: ModelLoader, vocab_size: int) -> Model:
    """As `loader` makes it: in the types and the split of the config, with memory for this rank's share only."""
    cfg = job.cfg
    with paddle.LazyGuard():
        build_model = build_stage2 if job.reads_language else build_stage1
        model = build_model(cfg.model, vocab_size=vocab_size)
    parts = [part for part in ("vision", "language") if hasattr(model, part)]
    loader.lay_out(model, parts, compact=parts)
    compact = {name: _random_tensor(name, parameter) for name, parameter in model.named_parameters() if compact_of(parameter)}
    fill(model, compact, "random numbers", allow_missing=[("", "random")])
    for part in parts:
        if getattr(cfg.model, part).frozen:
            freeze(getattr(model, part))
    model.eval()
    return model


def _random_tensor(name: str, parameter: Tensor) -> StoredTensor:
    """What a parameter that is kept in fewer bytes is made of, as if it came from a file: it cannot be drawn as it is kept."""
    share = share_of(parameter)
    shape = tuple(parameter.shape) if share is None else share.whole
    draw = np.random.default_rng(0).standard_normal
    return StoredTensor(name, shape, np.dtype(np.float32), lambda: _SCALE * draw(shape, dtype=np.float32))
