"""Data parallelism, sharding, and tensor parallelism through paddle's fleet."""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.distributed import fleet
from paddle.distributed.fleet.base import topology
from paddle.distributed.parallel import sync_params_buffers

from blip2x.config.run import Device, HybridConfig
from blip2x.errors import UserError
from blip2x.parallel.collectives import GatherWithGrad, gather, summed
from blip2x.parallel.context import Context, TensorGroup
from blip2x.parallel.degrees import Degrees, resolve_degrees
from blip2x.parallel.devices import local_rank, select_device, started_processes
from blip2x.parallel.meeting import Host, Meeting, host_name, join
from blip2x.parallel.sharding import ShardedOptimizer, SlicedLayer
from blip2x.registry import STRATEGIES

T = TypeVar("T")


@STRATEGIES.register("hybrid")
def build(cfg: HybridConfig, device: Device) -> Context:
    """Join the processes that the launcher started.

    Raises:
        UserError: degrees and processes do not match, or this device cannot do what is asked for.
    """
    world_size = started_processes()
    degrees = resolve_degrees(cfg.dp, cfg.sharding, cfg.tp, world_size)
    name = select_device(device)
    check_sharding(cfg.sharding_stage, degrees, name)
    if world_size == 1:
        return Context(device=name)
    with redirect_stderr(io.StringIO()):  # paddle prints the flags that startup.py has set
        if degrees.dp == world_size:
            # fleet would make further groups; paddle's gloo lets groups read each other's addresses, so that more than two
            # processes on a CPU often do not find each other
            dist.init_parallel_env()
        else:
            _init_fleet(degrees)
    rank = dist.get_rank()
    tensor = TensorGroup()
    if degrees.tp > 1:
        group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        tensor = TensorGroup(rank % degrees.tp, degrees.tp, group)
    return HybridContext(
        rank,
        world_size,
        local_rank(),
        name,
        tensor,
        degrees=degrees,
        sharding_stage=cfg.sharding_stage,
        data_group=_data_group(degrees, rank),
        meeting=_meeting(rank, world_size) if name == "cpu" else None,
    )


def check_sharding(stage: int, degrees: Degrees, device: str) -> None:
    """Raise `UserError` where stage and degree contradict each other, or paddle cannot do that on `device`."""
    if (stage == 0) != (degrees.sharding == 1):
        raise UserError(
            f"parallelism.sharding_stage={stage} with parallelism.sharding={degrees.sharding}: stage 0 shards nothing and "
            "needs degree 1, stages 1 to 3 need degree 2 or more"
        )
    if device != "cpu":
        return
    if stage == 3:
        raise UserError("parallelism.sharding_stage=3 needs GPUs: paddle shards parameters on no CPU; use stage 1 or 2, or dp")
    ranks = degrees.dp * degrees.sharding * degrees.tp
    if ranks > 2 and degrees.dp < ranks:
        raise UserError(
            f"sharding and tensor parallelism over {ranks} CPU processes do not start reliably with paddle's gloo; "
            "use parallelism=dp, or 2 processes"
        )


def _init_fleet(degrees: Degrees) -> None:
    strategy = fleet.DistributedStrategy()
    counts = {"dp_degree": degrees.dp, "sharding_degree": degrees.sharding, "mp_degree": degrees.tp}
    strategy.hybrid_configs = {**counts, "pp_degree": 1}
    former = topology._HYBRID_PARALLEL_GROUP  # of a sweep's former job; fleet would keep it, whatever its degrees
    if former and (former._dp_degree, former._sharding_degree, former._mp_degree) != (degrees.dp, degrees.sharding, degrees.tp):
        topology._HYBRID_PARALLEL_GROUP = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Current global rank")  # is not in a group of others: no news
        fleet.init(is_collective=True, strategy=strategy, log_level=logging.ERROR)


def _data_group(degrees: Degrees, rank: int) -> Any:
    """The ranks that stand where this one stands in its tensor group; None: all ranks."""
    if degrees.tp == 1:
        return None
    groups = fleet.get_hybrid_communicate_group()
    if degrees.sharding == 1:
        return groups.get_data_parallel_group()
    if degrees.dp == 1:
        return groups.get_sharding_parallel_group()
    world_size = degrees.dp * degrees.sharding * degrees.tp
    # every rank has to make every group, in the same order
    made = [dist.new_group(list(range(first, world_size, degrees.tp))) for first in range(degrees.tp)]
    return made[rank % degrees.tp]


def _meeting(rank: int, world_size: int) -> Meeting:
    host = Host(host_name()) if rank == 0 else None
    found = [(host.address, host.key) if host else None]
    dist.broadcast_object_list(found, src=0)
    return host.receive(world_size - 1) if host else join(*found[0])


@dataclass(frozen=True)
class HybridContext(Context):
    """One of several ranks."""

    degrees: Degrees = field(kw_only=True)
    sharding_stage: int = field(kw_only=True)
    data_group: Any = field(kw_only=True)  # paddle's group of the data ranks; None: all ranks
    meeting: Meeting | None = field(kw_only=True, compare=False)  # None: what is exchanged waits by itself

    def wrap(self, objective: nn.Layer, optimizer: paddle.optimizer.Optimizer) -> tuple[nn.Layer, Any]:
        """Wrap for this context's degrees; trained parameters and buffers become rank 0's, frozen ones are not sent.

        Raises:
            RuntimeError: frozen parameters differ between ranks (they were drawn from different seeds).
        """
        self._skip_frozen(objective)
        if self.sharding_stage == 0:
            # Over the tensor groups, too: their ranks work out the same gradients but for what GPUs round differently each
            # time, by which their copies of what is trained would drift apart.
            # Paddle looks once which parameters get no gradient; where that changes, it has to look at each step.
            return paddle.DataParallel(objective, find_unused_parameters=getattr(objective, "gradients_vary", False)), optimizer
        sync_params_buffers(objective, fuse_params=False)
        groups = fleet.get_hybrid_communicate_group()
        if self.sharding_stage == 3:
            return SlicedLayer(objective, optimizer, groups), optimizer
        return objective, ShardedOptimizer(optimizer, groups, share_gradients=self.sharding_stage == 2)

    def accumulating(self, wrapped: nn.Layer) -> AbstractContextManager[Any]:
        """Only paddle.DataParallel sends gradients during backward() and can do without; sharding adds up as it should."""
        return wrapped.no_sync() if isinstance(wrapped, paddle.DataParallel) else nullcontext()

    def gather_parameters(self, wrapped: nn.Layer) -> None:
        """Stage 3 keeps slices; the others have every parameter on every rank."""
        if self.sharding_stage == 3:
            wrapped.get_all_parameters()

    def optimizer_state(self, wrapped: nn.Layer, optimizer: Any, parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """With sharding one parameter after the other is collected from the ranks that have a part of it."""
        if self.sharding_stage == 0:
            return super().optimizer_state(wrapped, optimizer, parameters) if self.is_main else {}
        return self._sharded_by(wrapped, optimizer).state(parameters)

    def set_optimizer_state(
        self, wrapped: nn.Layer, optimizer: Any, parameters: Mapping[str, Tensor], state: Mapping[str, np.ndarray]
    ) -> None:
        """Each rank takes what it keeps."""
        if self.sharding_stage == 0:
            super().set_optimizer_state(wrapped, optimizer, parameters, state)
        else:
            self._sharded_by(wrapped, optimizer).set_state(parameters, state)

    def grad_norm(self, wrapped: nn.Layer, optimizer: Any, parameters: list[Tensor]) -> Tensor | None:
        """With sharding the gradients are averaged for it, which the step then does not do again."""
        if self.sharding_stage == 0:
            return super().grad_norm(wrapped, optimizer, parameters)
        return self._sharded_by(wrapped, optimizer).norm()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[B, ...] of each data rank -> [data_size * B, ...], without gradient."""
        return gather(tensor.detach(), self.data_group) if self.data_size > 1 else tensor.detach()

    def all_gather_with_grad(self, tensor: Tensor) -> Tensor:
        """[B, ...] of each data rank -> [data_size * B, ...]; see `GatherWithGrad`."""
        return GatherWithGrad.apply(tensor, self.data_group, self.data_rank) if self.data_size > 1 else tensor

    def mean(self, value: float) -> float:
        """Mean over data ranks, in float64."""
        return float(self.total(paddle.to_tensor(value, dtype="float64"))) / self.data_size

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over data ranks, without gradient."""
        return summed(tensor.detach(), self.data_group) if self.data_size > 1 else tensor.detach()

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        self._meet()
        found = paddle.to_tensor(int(flag), dtype="int32")
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def gather_objects(self, value: T) -> list[T]:
        """Every data rank's picklable object, in their order."""
        self._meet()
        if self.data_size == 1:
            return [value]
        values: list[T] = []
        dist.all_gather_object(values, value, group=self.data_group)
        return values

    def broadcast_object(self, value: T) -> T:
        """Rank 0's picklable object."""
        self._meet()
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.meeting:
            self.meeting.wait()
        else:
            dist.barrier()

    def _meet(self) -> None:
        if self.meeting:
            self.meeting.wait()

    def _sharded_by(self, wrapped: nn.Layer, optimizer: Any) -> ShardedOptimizer | SlicedLayer:
        return wrapped if self.sharding_stage == 3 else optimizer

    def _skip_frozen(self, objective: nn.Layer) -> None:
        whole, shares = hashlib.sha256(), hashlib.sha256()
        for parameter in objective.parameters():
            if parameter.stop_gradient:
                parameter.no_sync = True  # paddle's mark: neither broadcast at the start nor reduced
                # the first values are enough to tell two seeds apart
                digest = whole if getattr(parameter, "share", None) is None else shares
                digest.update(parameter.flatten()[:16].numpy().tobytes())
        self._meet()
        found: list[tuple[int, str, str]] = []
        dist.all_gather_object(found, (self.tensor.rank, whole.hexdigest(), shares.hexdigest()))
        if len({digest for _, digest, _ in found}) > 1 or len({(rank, digest) for rank, _, digest in found}) > self.tensor.size:
            raise RuntimeError("frozen parameters differ between ranks; seed all ranks alike before the model is built")
