"""How fast this machine multiplies matrices: what a model's arithmetic is measured against."""

from __future__ import annotations

import time
from collections.abc import Sequence

import paddle

from blip2x.config.run import PrecisionConfig
from blip2x.engine.amp import full_precision
from blip2x.models.precision import LOW
from blip2x.tasks.benchmarking.clock import waiting_for

_TIMES = 5  # that each product is made


def matrix_peak(sizes: Sequence[int], precision: PrecisionConfig, device: str) -> float:
    """Multiplications and additions per second of this rank, in the numbers that models compute in: the best product's.

    All ranks of a CPU should measure at the same time, since they share it.
    """
    wait, best = waiting_for(device), 0.0
    dtype = LOW.get(precision.name, "float32")
    with paddle.no_grad(), full_precision():
        for size in sizes:
            matrix = paddle.rand([size, size]).astype(dtype)
            paddle.matmul(matrix, matrix)
            for _ in range(_TIMES):
                wait()
                started = time.perf_counter()
                paddle.matmul(matrix, matrix)
                wait()
                best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
