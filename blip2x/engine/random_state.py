"""The state of the three generators that a run draws from, as JSON can hold it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle.base import core

State = dict[str, Any]


def random_state() -> State:
    """Where Python's, NumPy's and Paddle's generators (the current device's) stand."""
    version, words, spare = random.getstate()
    name, keys, *rest = np.random.get_state()
    _, seed, offset, engine = _generator().get_state().__getstate__()
    return {
        "python": [version, list(words), spare],
        "numpy": [name, keys.tolist(), *rest],
        "paddle": [seed, offset, bytes(engine).decode("ascii")],
    }


def set_random_state(state: State) -> None:
    """Go on from what `random_state` gave, on a device of the same kind."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    seed, offset, engine = state["paddle"]
    generator = _generator()
    device, *_ = generator.get_state().__getstate__()
    new = core.GeneratorState.__new__(core.GeneratorState)
    new.__setstate__((device, seed, offset, list(engine.encode("ascii"))))
    generator.set_state(new)


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Whatever the block draws, what is drawn after it is the same as without it."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


def _generator() -> Any:
    kind, _, index = paddle.get_device().partition(":")
    return core.default_cuda_generator(int(index)) if kind == "gpu" else core.default_cpu_generator()
