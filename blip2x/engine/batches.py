"""Batches: dicts of arrays from the loader, of tensors for the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle


def to_tensors(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch with NumPy arrays as paddle tensors on the current device; other values stay as they are."""
    return {key: paddle.to_tensor(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


def batch_size(batch: dict[str, Any]) -> int:
    """Number of samples: the length of the first value's first axis."""
    return len(next(iter(batch.values())))
