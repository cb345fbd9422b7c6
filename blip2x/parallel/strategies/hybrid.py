"""Data parallelism, and sharding of optimizer state, gradients and parameters through paddle's fleet."""

from __future__ import annotations

import hashlib
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed import fleet

from blip2x.config.run import Device, HybridConfig
from blip2x.errors import UserError
from blip2x.parallel.collectives import GatherWithGrad, gather
from blip2x.parallel.context import Context
from blip2x.parallel.degrees import Degrees, resolve_degrees
from blip2x.parallel.devices import local_rank, select_device, started_processes
from blip2x.registry import STRATEGIES

T = TypeVar("T")


@STRATEGIES.register("hybrid")
def build(cfg: HybridConfig, device: Device) -> Context:
    """Join the processes that the launcher started.

    Raises:
        UserError: degrees and processes do not match, or this device cannot do the sharding that is asked for.
    """
    world_size = started_processes()
    degrees = resolve_degrees(cfg.dp, cfg.sharding, world_size)
    name = select_device(device)
    check_sharding(cfg.sharding_stage, degrees, name)
    if world_size == 1:
        return Context(device=name)
    if degrees.sharding == 1:
        # fleet would make further groups; paddle's gloo lets groups read each other's addresses, so that more than two
        # processes on a CPU often do not find each other
        dist.init_parallel_env()
    else:
        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs = {"dp_degree": degrees.dp, "sharding_degree": degrees.sharding, "mp_degree": 1, "pp_degree": 1}
        fleet.init(is_collective=True, strategy=strategy, log_level=logging.ERROR)
    return HybridContext(dist.get_rank(), world_size, local_rank(), name, degrees=degrees, sharding_stage=cfg.sharding_stage)


def check_sharding(stage: int, degrees: Degrees, device: str) -> None:
    """Raise `UserError` where stage and degree contradict each other, or paddle has no such sharding on `device`."""
    if (stage == 0) != (degrees.sharding == 1):
        raise UserError(
            f"parallelism.sharding_stage={stage} with parallelism.sharding={degrees.sharding}: stage 0 shards nothing and "
            "needs degree 1, stages 1 to 3 need degree 2 or more"
        )
    if device == "cpu" and stage >= 2:
        raise UserError(f"parallelism.sharding_stage={stage} needs GPUs: paddle shards gradients on no CPU; use stage 1 or dp")
    if device == "cpu" and stage == 1 and degrees.dp * degrees.sharding > 2:
        raise UserError(
            f"sharding over {degrees.dp * degrees.sharding} CPU processes does not start reliably with paddle's gloo; "
            "use parallelism=dp, or 2 processes"
        )


def _reduce_only_gradients(optimizer: Any) -> None:
    """Paddle's sharding makes up gradients of 0 where there are none: weights would decay that no loss depends on yet."""
    reduce = optimizer.reduce_gradients
    optimizer.reduce_gradients = lambda parameters, groups: reduce([p for p in parameters if p.grad is not None], groups)


@dataclass(frozen=True)
class HybridContext(Context):
    """One of several ranks; collectives run over all of them."""

    degrees: Degrees = field(kw_only=True)
    sharding_stage: int = field(kw_only=True)

    def wrap(self, objective: nn.Layer, optimizer: paddle.optimizer.Optimizer) -> tuple[nn.Layer, Any]:
        """Wrap for this context's degrees; trained parameters and buffers become rank 0's, frozen ones are not sent.

        Raises:
            RuntimeError: frozen parameters differ between ranks (they were drawn from different seeds).
        """
        self._skip_frozen(objective)
        if self.sharding_stage == 0:
            # paddle looks once which parameters get no gradient; where that changes, it has to look at each step
            vary = getattr(objective, "gradients_vary", False)
            return paddle.DataParallel(objective, find_unused_parameters=vary), optimizer
        if self.sharding_stage == 1:
            sharded = fleet.distributed_optimizer(optimizer)
            _reduce_only_gradients(sharded._inner_opt)
            return fleet.distributed_model(objective), sharded
        groups = fleet.get_hybrid_communicate_group()
        level = "os_g" if self.sharding_stage == 2 else "p_g_os"
        wrapped, optimizer, _ = dist.sharding.group_sharded_parallel(
            objective,
            optimizer,
            level,
            group=groups.get_sharding_parallel_group(),
            dp_group=groups.get_data_parallel_group() if self.degrees.dp > 1 else None,
        )
        return wrapped, optimizer

    def accumulating(self, wrapped: nn.Layer) -> AbstractContextManager[Any]:
        """Only paddle.DataParallel sends gradients during backward(); the sharded optimizers do so by themselves."""
        return wrapped.no_sync() if self.sharding_stage == 0 else nullcontext()

    def gather_parameters(self, wrapped: nn.Layer) -> None:
        """Stage 3 keeps slices; the others have every parameter on every rank."""
        if self.sharding_stage == 3:
            wrapped.get_all_parameters()

    def grad_norm(self, parameters: list[Tensor]) -> Tensor | None:
        """Sharded gradients are only averaged inside the optimizer's step."""
        return super().grad_norm(parameters) if self.sharding_stage == 0 else None

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[B, ...] of each rank -> [world_size * B, ...], without gradient."""
        return gather(tensor.detach())

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        """[B, ...] of each rank -> [world_size * B, ...]; see `GatherWithGrad`."""
        return GatherWithGrad.apply(tensor)

    def mean(self, value: float) -> float:
        """Mean over ranks, in float64."""
        total = paddle.to_tensor(value, dtype="float64")
        dist.all_reduce(total)
        return float(total) / self.world_size

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's picklable object, in rank order."""
        values: list[T] = []
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value: T) -> T:
        """Rank 0's picklable object."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def _skip_frozen(self, objective: nn.Layer) -> None:
        digest = hashlib.sha256()
        for parameter in objective.parameters():
            if parameter.stop_gradient:
                parameter.no_sync = True  # paddle's mark: neither broadcast at the start nor reduced
                # the first values are enough to tell two seeds apart
                digest.update(parameter.flatten()[:16].numpy().tobytes())
        if len(set(self.gather_objects(digest.hexdigest()))) > 1:
            raise RuntimeError("frozen parameters differ between ranks; seed all ranks alike before the model is built")
