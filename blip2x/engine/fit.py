"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from paddle import Tensor, nn

from blip2x.config.run import OptimConfig
from blip2x.config.task import TrainingConfig
from blip2x.engine.batches import batch_size, to_tensors
from blip2x.engine.losses import LossRecord
from blip2x.engine.progress import ProgressBar
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.models.freeze import set_eval_mode, set_train_mode
from blip2x.optim.build import build_optimizer
from blip2x.optim.groups import trained_parameters
from blip2x.parallel.context import Context


class Loader(Protocol):
    """Gives the batches of one epoch each time it is iterated; `set_epoch(n)`, where it has one, comes before."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class FitResult:
    """What a training came to."""

    steps: int
    seconds: float
    metrics: dict[str, float]  # of the last line in metrics.jsonl, `evaluate`'s results among them


def fit(
    objective: nn.Layer,
    loader: Loader,
    cfg: TrainingConfig,
    optim: OptimConfig,
    context: Context,
    run: Run,
    *,
    stage: str,
    evaluate: Callable[[], dict[str, float]] | None = None,
    save: Callable[[int], Any] | None = None,
) -> FitResult:
    """Train what `objective` does not freeze, in place; it is in eval mode afterwards.

    Args:
        objective: batch of tensors -> {"loss": scalar to minimise, other parts to report}; `set_step(step)`, where it has
            one, is called before each optimizer step. `gradients_vary`, where it has one: whether at some steps it leaves
            parameters without a gradient that get one at others.
        loader: micro-batches of this rank; all ranks have equally many.
        cfg: how long, how big, how often.
        optim: optimizer and schedule.
        context: the other ranks.
        run: where metrics and progress go.
        stage: name of this training in metrics.jsonl.
        evaluate: called on every rank wherever a checkpoint is due and after the last step; its values are logged.
        save: writes the checkpoint of a step; called on rank 0 every `cfg.save_every` steps and after the last one.

    Raises:
        UserError: there are too little data, or the loss is not finite; it names step and part.
    """
    total = count_steps(cfg, len(loader))
    if optim.warmup_steps >= total:
        run.console.print(f"note: {stage} ends after {total} steps, within the warm-up of {optim.warmup_steps}", markup=False)
    optimizer, schedule = build_optimizer(optim, objective, total)
    parameters = trained_parameters(objective)
    wrapped, optimizer = context.wrap(objective, optimizer)
    record = LossRecord(stage, context)
    batches = _endless(loader)
    metrics: dict[str, float] = {}
    started = last_log = time.monotonic()
    samples = 0
    set_train_mode(objective)
    with ProgressBar(run.console, stage, total) as bar:
        for step in range(1, total + 1):
            if hasattr(objective, "set_step"):
                objective.set_step(step - 1)
            parts, seen = _backward(wrapped, batches, cfg.accumulate, context)
            samples += seen
            record.add(step, parts)
            saves = step == total or (cfg.save_every is not None and step % cfg.save_every == 0)
            due = saves or step % cfg.log_every == 0  # a line looks for nan: none may replace a good checkpoint
            norm = context.grad_norm(parameters) if due else None
            lr = schedule.get_lr()
            optimizer.step()
            optimizer.clear_grad()
            schedule.step()
            if due:
                now = time.monotonic()
                metrics = _line(record.read(), norm, lr, stage, step)
                metrics["samples_per_second"] = round(samples * context.world_size / (now - last_log), 3)
                metrics["seconds"] = round(now - started, 3)
                run.log_metrics(stage, step, metrics)
                last_log, samples = now, 0
            bar.advance(seen * context.world_size, _text(metrics) if due else None)
            if saves:
                paused = time.monotonic()
                context.gather_parameters(wrapped)
                metrics = {**metrics, **_checkpoint(objective, context, run, stage, step, evaluate, save)}
                last_log += time.monotonic() - paused  # saving is not training: leave it out of the rate
    set_eval_mode(objective)
    return FitResult(total, time.monotonic() - started, metrics)


def count_steps(cfg: TrainingConfig, batches_per_epoch: int) -> int:
    """Optimizer steps of a whole training, at least 1.

    Raises:
        UserError: there are too little data for one step.
    """
    if batches_per_epoch < 1:
        raise UserError(f"the training data make no batch of task.batch_size={cfg.batch_size}; lower it or add data")
    steps = cfg.max_steps or cfg.max_epochs * batches_per_epoch // cfg.accumulate
    if steps < 1:
        raise UserError(
            f"{cfg.max_epochs} epoch(s) of {batches_per_epoch} batches are fewer than task.accumulate={cfg.accumulate}; "
            "lower it or train longer"
        )
    return steps


def _checkpoint(
    objective: nn.Layer,
    context: Context,
    run: Run,
    stage: str,
    step: int,
    evaluate: Callable[[], dict[str, float]] | None,
    save: Callable[[int], Any] | None,
) -> dict[str, float]:
    if save:
        context.on_main(lambda: save(step))
    if not evaluate:
        return {}
    set_eval_mode(objective)
    results = evaluate()
    run.log_metrics(stage, step, results)
    set_train_mode(objective)
    return results


def _endless(loader: Loader) -> Iterator[dict[str, Any]]:
    epoch = 0
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise UserError(f"epoch {epoch} of the training data is empty; see the log for samples that were skipped")
        epoch += 1


def _backward(
    wrapped: nn.Layer, batches: Iterator[dict[str, Any]], accumulate: int, context: Context
) -> tuple[list[dict[str, Tensor]], int]:
    """Gradients of one step: the mean over `accumulate` micro-batches. Gives each one's loss parts and the samples seen."""
    collected, seen = [], 0
    for micro in range(accumulate):
        batch = to_tensors(next(batches))
        seen += batch_size(batch)
        if micro < accumulate - 1:
            with context.accumulating(wrapped):
                parts = wrapped(batch)
                (parts["loss"] / accumulate).backward()
        else:
            parts = wrapped(batch)
            (parts["loss"] / accumulate).backward()
        collected.append({name: value.detach() for name, value in parts.items()})
    return collected, seen


def _line(parts: dict[str, float], norm: Tensor | None, lr: float, stage: str, step: int) -> dict[str, float]:
    line = {"lr": lr, **parts}
    if norm is not None:
        line["grad_norm"] = float(norm)
        if not math.isfinite(line["grad_norm"]):
            raise UserError(f"{stage}: the gradient's norm is {line['grad_norm']} at step {step}; try a smaller optim.lr")
    return line


def _text(metrics: dict[str, float]) -> str:
    shown = {name: value for name, value in metrics.items() if name not in ("grad_norm", "samples_per_second", "seconds")}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
