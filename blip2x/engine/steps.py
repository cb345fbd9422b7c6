"""How many optimizer steps a training has, and of which samples: the same when it is gone on with on other ranks."""

from __future__ import annotations

from blip2x.config.task import TrainingConfig
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.parallel.context import Context

STEPS_FILE = "steps.json"  # in a training stage's folder


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


def agreed_steps(cfg: TrainingConfig, batches_per_epoch: int, context: Context, run: Run, *, mixes_samples: bool) -> int:
    """`count_steps`, or as many as when the run began: with another number of ranks an epoch may end some samples earlier.

    Args:
        cfg: how long and how big.
        batches_per_epoch: of this rank.
        context: the ranks; all of them must come here.
        run: the training's, in whose folder its steps are written down.
        mixes_samples: whether it matters which samples share a micro-batch.

    Raises:
        UserError: there are too little data for one step, or the run that is gone on with had other samples in one.
    """
    per_batch = cfg.batch_size * context.data_size
    now = {
        "total": count_steps(cfg, batches_per_epoch),
        "samples_per_batch": per_batch,
        "samples_per_step": per_batch * cfg.accumulate,
    }
    before = context.broadcast_object(run.read_json(STEPS_FILE)) if run.goes_on else None
    if before:
        _require_same_samples(before, now, mixes_samples=mixes_samples)
        return before["total"]
    run.write_json(now, STEPS_FILE)
    return now["total"]


def _require_same_samples(before: dict[str, int], now: dict[str, int], *, mixes_samples: bool) -> None:
    of = {"samples_per_step": ("step", "task.batch_size x task.accumulate")}
    if mixes_samples:
        of["samples_per_batch"] = ("micro-batch, among which pairs are compared,", "task.batch_size")
    for name, (what, factors) in of.items():
        if now[name] != before[name]:
            raise UserError(
                f"a {what} of this run has {before[name]} samples ({factors} x ranks with samples of their own), now it would "
                f"have {now[name]}; choose numbers that make it {before[name]} again"
            )
