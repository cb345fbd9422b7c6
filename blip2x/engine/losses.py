"""The loss parts between two log lines: their means, and the first that is no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.errors import UserError
from blip2x.parallel.context import Context


class NotFiniteError(UserError):
    """A loss part or a gradient that is nan or infinite, at optimizer step `step`."""

    def __init__(self, stage: str, what: str, value: float, step: int):
        super().__init__(
            f"{stage}: {what} is {value} at step {step}; "
            "try a smaller optim.lr, a longer optim.warmup_steps or a smaller optim.clip_grad_norm"
        )
        self.what, self.value, self.step = what, value, step


class LossRecord:
    """Collects scalars on the device; only `read` waits for it.

    On the CPU, where waiting costs nothing, one process looks at every step's values at once. On a GPU or with several ranks
    a bad value is found when the next line is due, still with the step that it came from, and by all ranks together.
    """

    def __init__(self, stage: str, context: Context):
        self._stage = stage
        self._context = context
        self._check_now = context.device == "cpu" and context.world_size == 1
        # A training may have other parts from some step on: steps and values by the names of their parts
        self._groups: dict[tuple[str, ...], tuple[list[int], list[Tensor]]] = {}

    def add(self, step: int, micro_batches: list[dict[str, Tensor]]) -> None:
        """Take step `step`'s parts, one dict per micro-batch.

        Raises:
            NotFiniteError: a part is nan or infinite, where that can be seen without waiting.
        """
        names = tuple(micro_batches[0])
        values = [parts[name].detach().astype("float32").reshape([]) for parts in micro_batches for name in names]
        row = paddle.stack(values).reshape([len(micro_batches), -1]).mean(axis=0)
        steps, rows = self._groups.setdefault(names, ([], []))
        steps.append(step)
        rows.append(row)
        if self._check_now:
            self._check(names, [step], [row])

    def read(self) -> dict[str, float]:
        """Means over ranks and over the steps since the last call that had the part; all ranks must call it.

        Raises:
            NotFiniteError: a part was nan or infinite on any rank.
        """
        values: dict[str, list[float]] = {}
        for names, (steps, rows) in self._groups.items():
            values_SN = self._check(names, steps, rows)  # S steps, N parts
            for name, column_S in zip(names, values_SN.T, strict=True):
                values.setdefault(name, []).extend(column_S)
        self._groups = {}
        return {name: float(np.mean(column)) for name, column in values.items()}

    def check(self) -> None:
        """Raise `NotFiniteError` where a value that `read` has not given yet is nan or infinite; all ranks must call it."""
        for names, (steps, rows) in self._groups.items():
            self._check(names, steps, rows)

    def pending(self) -> list[dict[str, Any]]:
        """This rank's values that `read` has not given yet, as JSON can hold them."""
        return [
            {"names": list(names), "steps": steps, "rows": [row.numpy().tolist() for row in rows]}
            for names, (steps, rows) in self._groups.items()
        ]

    def restore(self, pending: list[dict[str, Any]]) -> None:
        """Take back what `pending` gave."""
        for group in pending:
            rows = [paddle.to_tensor(row, dtype="float32") for row in group["rows"]]
            self._groups[tuple(group["names"])] = (list(group["steps"]), rows)

    def _check(self, names: tuple[str, ...], steps: list[int], rows: list[Tensor]) -> np.ndarray:
        local_SN = paddle.stack(rows)
        values_RSN = self._context.all_gather(local_SN).numpy().reshape(-1, *local_SN.shape)  # R ranks
        bad = np.argwhere(~np.isfinite(values_RSN).all(axis=0))
        if len(bad):
            step, part = bad[0]
            value = next(v for v in values_RSN[:, step, part] if not np.isfinite(v))
            raise NotFiniteError(self._stage, f"loss part {names[part]!r}", float(value), steps[step])
        return values_RSN.mean(axis=0)
