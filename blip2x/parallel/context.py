"""What a rank knows of the others, and the few collectives that training needs.

The base class is the single process: every collective is the identity and nothing of paddle.distributed is initialised.

Data ranks have different samples. With tensor parallelism several ranks stand for one of them: they see the same samples and
share the matrices of the frozen models. Gathering, means and sums are over data ranks; barriers and objects from rank 0 over
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import paddle
from paddle import Tensor, nn

from blip2x.parallel.optimizer_state import read_state, write_state

T = TypeVar("T")


@dataclass(frozen=True)
class TensorGroup:
    """The `size` ranks that share a matrix, this one's place among them, and paddle's group of them (None: it is alone)."""

    rank: int = 0
    size: int = 1
    group: Any = None


@dataclass(frozen=True)
class Context:
    """One rank among `world_size`; local_rank counts within the machine, device is paddle's name ("cpu", "gpu:0")."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    tensor: TensorGroup = TensorGroup()

    @property
    def data_rank(self) -> int:
        """This rank's place among those that have different samples."""
        return self.rank // self.tensor.size

    @property
    def data_size(self) -> int:
        """How many ranks have different samples."""
        return self.world_size // self.tensor.size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def wrap(self, objective: nn.Layer, optimizer: paddle.optimizer.Optimizer) -> tuple[nn.Layer, Any]:
        """The callable and the optimizer that share gradients, and what else is sharded, between ranks."""
        return objective, optimizer

    def accumulating(self, wrapped: nn.Layer) -> AbstractContextManager[Any]:
        """Forward and backward inside keep gradients on this rank; for all micro-batches of a step but the last."""
        return nullcontext()

    def gather_parameters(self, wrapped: nn.Layer) -> None:
        """Make every parameter whole on every rank, before it is saved or evaluated; all ranks must call it."""

    def optimizer_state(self, wrapped: nn.Layer, optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The optimizer's state, whole, under the names of `parameters`: "<name>.moment1", ".moment2" and so on.

        `wrapped` and `optimizer` are what `wrap` gave. All ranks must call it; only rank 0 is given the arrays. A parameter
        that has had no step yet has none.
        """
        return read_state(optimizer, parameters)

    def set_optimizer_state(
        self, wrapped: nn.Layer, optimizer: Any, parameters: Mapping[str, Tensor], state: Mapping[str, np.ndarray]
    ) -> None:
        """Put back what `optimizer_state` gave, under this or any other layout; all ranks call it with all of the state."""
        write_state(optimizer, parameters, state)

    def grad_norm(self, wrapped: nn.Layer, optimizer: Any, parameters: list[Tensor]) -> Tensor | None:
        """Global norm of the gradients before clipping, between backward() and the optimizer's step; all ranks must call it.

        `wrapped` and `optimizer` are what `wrap` gave. None where nothing has a gradient.
        """
        squares = [(p.grad.astype("float32") ** 2).sum() for p in parameters if p.grad is not None]
        return paddle.sqrt(paddle.add_n(squares)) if squares else None

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the ranks' tensors, all of one shape [B, ...], along axis 0 in rank order; no gradient flows."""
        return tensor.detach()

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        """As `all_gather`; every rank's use of the result sends its gradient back to the rank it came from."""
        return tensor

    def mean(self, value: float) -> float:
        """Mean over data ranks."""
        return value

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over data ranks; no gradient flows."""
        return tensor.detach()

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        return flag

    def gather_objects(self, value: T) -> list[T]:
        """Every data rank's object, in their order, on every rank."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """Rank 0's object on every rank."""
        return value

    def barrier(self) -> None:
        """Wait for all ranks."""

    def on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only and give its result (which can be pickled), or its exception, to every rank."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.is_main:
            try:
                outcome = (action(), None)
            except Exception as error:  # the other ranks would wait for ever in their next collective
                outcome = (None, error)
        result, error = self.broadcast_object(outcome)
        if error is not None:
            raise error
        return result
