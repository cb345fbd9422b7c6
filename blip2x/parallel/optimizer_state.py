"""What AdamW remembers of each parameter, under names that survive another process, another layout, another paddle.

Paddle's own state dict goes by the parameters' automatic names (`linear_12.w_0_moment1_0`), which change as soon as another
layer is built first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

# paddle's name -> name in checkpoints
KINDS = {"moment1": "moment1", "moment2": "moment2", "beta1_pow_acc": "beta1_power", "beta2_pow_acc": "beta2_power"}


def read_state(optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Copies of the state of `parameters`, as "<name>.moment1" and so on; a parameter that has had no step has none."""
    state = {}
    for kind, stored in KINDS.items():
        held = optimizer._accumulators.get(kind, {})
        for name, parameter in parameters.items():
            if parameter.name in held:
                state[f"{name}.{stored}"] = np.array(held[parameter.name].numpy())
    return state


def write_state(optimizer: Any, parameters: Mapping[str, Tensor], state: Mapping[str, np.ndarray]) -> None:
    """Set the state of `parameters` to what `read_state` gave.

    Raises:
        ValueError: a parameter has only a part of its state there.
    """
    for name, parameter in parameters.items():
        found = {kind: state[f"{name}.{stored}"] for kind, stored in KINDS.items() if f"{name}.{stored}" in state}
        if not found:
            continue
        if len(found) != len(KINDS):
            raise ValueError(f"the optimizer's state of {name} is incomplete: only {', '.join(found)}")
        optimizer._create_accumulators(paddle.static.default_main_program().global_block(), [parameter])
        for kind, value in found.items():
            optimizer._accumulators[kind][parameter.name].set_value(value)
