"""Training as every task does it: loader, loop, checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paddle import nn

from blip2x.config.auto import PARTS, Settings
from blip2x.config.model import ModelConfig
from blip2x.config.run import RunConfig
from blip2x.data.collate import Collate
from blip2x.engine.checkpoint import Saveable, require_checkpoint_space, save_checkpoint
from blip2x.engine.fit import FitResult, fit
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.weights.describe import settings_of
from blip2x.parallel.seeding import seed_everything
from blip2x.tasks.common.loading import report_skipped, train_loader, write_skipped
from blip2x.tasks.common.weights import normalisation


def train(
    cfg: RunConfig,
    run: Run,
    objective: nn.Layer,
    model: nn.Layer,
    samples: Sequence[Any],
    collate: Collate,
    *,
    tokenizers: dict[str, Saveable],
    frozen_origin: dict[str, str],
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> FitResult:
    """Train `objective` on `samples`; what was trained of `model` is in ``checkpoint`` of the run's folder afterwards.

    Args:
        cfg: the whole config; its task says how long and how often.
        run: the task's run.
        objective: what is trained.
        model: what is saved, the objective's model.
        samples: of the training split.
        collate: makes their batches.
        tokenizers: part -> tokenizer, saved with the weights.
        frozen_origin: part -> where the weights of the model's frozen part are.
        evaluate: gives metrics on the evaluation split, wherever a checkpoint is due.

    Raises:
        UserError: no room for a checkpoint, too few samples, a bad image where the config says stop, or a loss that is not
            finite.
    """

    def save(step: int) -> None:
        save_checkpoint(
            run.path("checkpoint"),
            model,
            kind=cfg.task.kind,
            step=step,
            tokenizers=tokenizers,
            frozen_origin=frozen_origin,
            extra={
                "model": cfg.model.name,
                "settings": _settings(cfg.model, model),
                "dataset": cfg.dataset.name,
                "normalisation": normalisation(cfg.dataset),
            },
        )

    run.context.on_main(lambda: require_checkpoint_space(run.path("checkpoint"), model))  # before days of work, not after
    loader = train_loader(cfg, run, samples, collate)
    seed_everything(cfg.seed, run.context.rank)
    try:
        result = fit(objective, loader, cfg.task, cfg.optim, run.context, run, stage=run.stage, evaluate=evaluate, save=save)
    except UserError:
        write_skipped(run, loader.skipped)
        raise
    report_skipped(run, loader.skipped)
    return result


def _settings(cfg: ModelConfig, model: nn.Layer) -> Settings:
    parts = [part for part in PARTS if hasattr(model, part)] or ["language"]  # a language model that is fitted alone
    settings = settings_of(cfg, parts)
    if "language" in parts:  # the tokenizer's, where the config leaves it open
        settings["language.vocab_size"] = getattr(model, "language", model).vocab_size
    return settings
