"""Linear warm-up and cosine decay, a function of the optimizer step alone."""

from __future__ import annotations

import math

from paddle.optimizer.lr import LRScheduler


def learning_rate(
    step: int, *, lr: float, warmup_start_lr: float, warmup_steps: int, eta_min: float, total_steps: int
) -> float:
    """The rate of step `step`, counted from 0.

    It rises in a line from `warmup_start_lr` at step 0 to `lr` at step `warmup_steps`, then falls along half a cosine to
    `eta_min` at step `total_steps`, and stays there. A training that is no longer than its warm-up ends on the line.
    """
    if step < warmup_steps:
        return warmup_start_lr + (lr - warmup_start_lr) * step / warmup_steps
    if step >= total_steps:
        return eta_min
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * progress)) / 2


def planned_rates(points: int, **shape: float) -> list[tuple[int, float]]:
    """(number of the step, counted from 1, its rate) at about `points` steps of a training: both ends, the peak, and between.

    Args:
        points: how many, 2 or more; a shorter training has one per step.
        shape: the arguments of `learning_rate`.
    """
    last = int(shape["total_steps"]) - 1
    steps = {round(index * last / (points - 1)) for index in range(points)} | {min(int(shape["warmup_steps"]), last)}
    return [(step + 1, learning_rate(step, **shape)) for step in sorted(steps)]


class WarmupCosine(LRScheduler):
    """`learning_rate` as paddle's scheduler; call `step()` once per optimizer step.

    `shape` holds the arguments of `learning_rate`. The position is the base class's `last_epoch`, the one counter that paddle
    saves, so that its state round-trips.
    """

    def __init__(self, *, lr: float, warmup_start_lr: float, warmup_steps: int, eta_min: float, total_steps: int):
        self.shape = {
            "lr": lr,
            "warmup_start_lr": warmup_start_lr,
            "warmup_steps": warmup_steps,
            "eta_min": eta_min,
            "total_steps": total_steps,
        }
        super().__init__(learning_rate=lr)  # calls get_lr()

    def get_lr(self) -> float:
        """The rate of the step that comes next."""
        return learning_rate(self.last_epoch, **self.shape)
