"""What each rank of a sharding group keeps: optimizer state (stage 1), gradients (2), parameters (3).

Both classes are fleet's own with three changes. They do with parameters that no loss has reached yet: fleet's stage 1 makes up
gradients of 0, by which weights decay that nothing trains, its stage 2 leaves gradients unreduced that lie in one buffer with
them, without a word, and its stage 3 stops. Gradients can be averaged before the step, for their norm. And all stages clip as
one process does.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.base.framework import EagerParamBase
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer.dygraph_sharding_optimizer import DygraphShardingOptimizer
from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_stage3 as stage3

from blip2x.parallel.collectives import gather
from blip2x.parallel.optimizer_state import KINDS, read_state, write_state

T = TypeVar("T")

SEGMENT_SIZE = 2**20  # stage 3 cuts parameters that have more numbers
SLICE = "slice@"  # paddle's prefix for the name of a parameter's slice
# Linear layers that are not called, as their parent reads the matrix: paddle would not know when to gather it.
READ_BY_PARENT = ("qkv",)


class ShardedOptimizer(DygraphShardingOptimizer):
    """Stages 1 and 2: every parameter is whole on each rank, and one rank of the group updates it and sends it to the others.

    Args:
        optimizer: over all parameters; it is left with this rank's.
        groups: fleet's groups of ranks.
        share_gradients: stage 2: a gradient is summed as soon as it is there, and only the rank that needs it keeps it.
    """

    def __init__(self, optimizer: Any, groups: Any, *, share_gradients: bool):
        self.sharing, self.copies = groups.get_sharding_parallel_group(), _copies(groups)
        self.share_gradients, self.reached, self.averaged = share_gradients, set(), False
        _clip_alike(optimizer, self.sharing)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nccl reduce_avg")  # which averaging does without
            super().__init__(optimizer, groups)
        if share_gradients:
            for number, parameter in enumerate(self._parameter_list):
                parameter._register_backward_hook(_hook(self._send, number))

    def average(self) -> None:
        """Make the gradients that this rank needs means over all ranks, once a step."""
        if self.averaged:
            return
        self.averaged = True
        with paddle.no_grad():
            for number, parameter in enumerate(self._parameter_list):
                if parameter.grad is None:
                    continue
                if not self.share_gradients:
                    self._send(number)
                if self._is_mine(parameter):
                    _average(parameter.grad, self.copies, summed=self.sharing.nranks)

    def norm(self) -> Tensor | None:
        """Global norm of the averaged gradients, before clipping."""
        self.average()
        if not self.reached:
            return None
        mine = [p.grad for p in self._parameter_list if self._is_mine(p) and p.grad is not None]
        return _global_norm(mine, [], self.sharing)

    def step(self) -> None:
        """Update this rank's parameters, and get the others'."""
        self.average()
        super().step()

    def clear_grad(self, set_to_zero: bool = True) -> None:
        """Forget the step's gradients."""
        super().clear_grad(set_to_zero)
        self.averaged = False

    def state(self, parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """As `Context.optimizer_state`, for rank 0 only."""
        mine = read_state(self, {name: p for name, p in parameters.items() if self._is_mine(p)})
        held: list[dict[str, tuple[tuple[int, ...], str]]] = []
        shapes = {name: (value.shape, str(value.dtype)) for name, value in mine.items()}
        dist.all_gather_object(held, shapes, group=self.sharing)
        state = {}
        for owner, names in zip(self.sharing.ranks, held, strict=True):
            for name, (shape, dtype) in names.items():
                value = paddle.to_tensor(mine[name]) if name in mine else paddle.empty(shape, dtype)
                dist.broadcast(value, src=owner, group=self.sharing)
                if dist.get_rank() == 0:
                    state[name] = value.numpy()
        return state

    def set_state(self, parameters: Mapping[str, Tensor], state: Mapping[str, np.ndarray]) -> None:
        """As `Context.set_optimizer_state`."""
        write_state(self, {name: p for name, p in parameters.items() if self._is_mine(p)}, state)

    def _is_mine(self, parameter: Tensor) -> bool:
        return self._param2rank.get(parameter.name) == self.sharing.rank

    def _send(self, number: int) -> None:
        parameter = self._parameter_list[number]
        self.reached.add(parameter.name)
        with paddle.no_grad():
            owner = self.sharing.ranks[self._param2rank[parameter.name]]
            dist.reduce(parameter.grad, dst=owner, group=self.sharing)
            if self.share_gradients and not self._is_mine(parameter):
                parameter.clear_gradient(False)

    def _sharding_sync_parameters(self) -> None:
        with paddle.no_grad():
            for parameter in self._parameter_list:
                if parameter.name in self.reached:
                    owner = self.sharing.ranks[self._param2rank[parameter.name]]
                    dist.broadcast(parameter, src=owner, group=self.sharing)


class SlicedLayer(stage3.GroupShardedStage3):
    """Stage 3: each rank of the group keeps a slice of every big matrix, which is whole only while its layer is at work.

    Cut are the trained matrices of linear layers. Frozen parameters stay whole and are not sent, and so do embeddings, whose
    matrix is also the head's. Matrices are gathered when they are needed and not one layer ahead: where a layer is called twice
    in a step, paddle could take what it gathered before the step that changed it.

    Args:
        layer: what is trained.
        optimizer: over all its parameters; its `step` and `clear_grad` become this stage's.
        groups: fleet's groups of ranks.
    """

    def __init__(self, layer: nn.Layer, optimizer: Any, groups: Any):
        sharing, data = groups.get_sharding_parallel_group(), groups.get_data_parallel_group()
        _clip_alike(optimizer, sharing)
        decays = optimizer._apply_decay_param_fun
        if decays is not None:
            optimizer._apply_decay_param_fun = lambda name: decays(name.removeprefix(SLICE))
        stage3.TaskFlow().full_param.clear()  # all of paddle's share one dictionary, in which a former training's are left
        super().__init__(
            layer,
            optimizer,
            group=sharing,
            device=paddle.get_device().split(":")[0],
            segment_size=SEGMENT_SIZE,
            pretrain_sync_models=False,
            sync_comm=True,
            dp_group=data if data.nranks > 1 else None,
            exclude_layer=[id(part) for name, part in layer.named_sublayers(include_self=True) if not can_be_cut(name, part)],
        )
        self.copies, self.reached, self.averaged = _copies(groups), set(), False
        self.tensor = groups.get_model_parallel_group()
        self.whole = [parameter for parameter in self._ori_parameter_list if parameter.name not in self._param2buffer]
        for parameter in self.whole:
            parameter._register_backward_hook(_hook(self._note, parameter.name))

    def average(self) -> None:
        """Make the gradients of what is not cut means over all ranks, once a step; slices' are over data ranks already."""
        if self.averaged:
            return
        self.averaged = True
        if self.tensor.nranks > 1:
            for parameter in self.sliced:
                if parameter.bw_storage is not None:
                    _average(parameter.bw_storage, [self.tensor])
        for storage in self._grad_storages.values():
            dist.all_reduce(storage.buffer, group=self._group)
            _average(storage.buffer, self.copies, summed=self._group.nranks)

    def norm(self) -> Tensor | None:
        """Global norm of the averaged gradients, before clipping."""
        self.average()
        slices = [parameter.bw_storage for parameter in self.sliced if parameter.bw_storage is not None]
        whole = [parameter.grad for parameter in self.whole if parameter.name in self.reached]
        return _global_norm(slices, whole, self._group) if slices or whole else None

    def state(self, parameters: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """As `Context.optimizer_state`, for rank 0 only."""
        sliced = {name: self._stub(p) for name, p in parameters.items() if p.name in self._param2buffer}
        state = read_state(self._optim, {name: p for name, p in parameters.items() if name not in sliced})
        for name, stub in sliced.items():
            whole = parameters[name]
            for key, value in read_state(self._optim, {name: stub}).items():
                if value.shape != tuple(stub.shape):  # the powers of beta: one number for all slices
                    state[key] = value
                    continue
                slices = gather(paddle.to_tensor(value), self._group)
                if dist.get_rank() == 0:
                    state[key] = slices.numpy()[: whole.size].reshape(whole.shape)
        return state if dist.get_rank() == 0 else {}

    def set_state(self, parameters: Mapping[str, Tensor], state: Mapping[str, np.ndarray]) -> None:
        """As `Context.set_optimizer_state`."""
        held, own = {}, {}
        for name, parameter in parameters.items():
            is_cut = parameter.name in self._param2buffer
            held[name] = self._stub(parameter) if is_cut else parameter
            for kind in KINDS.values():
                value = state.get(f"{name}.{kind}")
                if value is not None:
                    own[f"{name}.{kind}"] = self._cut(value, parameter) if is_cut and value.size == parameter.size else value
        write_state(self._optim, held, own)

    def _stub(self, parameter: Tensor) -> EagerParamBase:
        """A stand-in for this rank's slice, which paddle makes anew at each step; it has its name and shape."""
        first, last = self._param2buffer[parameter.name][self._rank]
        return EagerParamBase(shape=[last - first], dtype=parameter.dtype, name=SLICE + parameter.name)

    def _cut(self, value: np.ndarray, parameter: Tensor) -> np.ndarray:
        first, last = self._param2buffer[parameter.name][self._rank]
        padded = np.zeros(self._param2buffer_size[parameter.name], value.dtype)
        padded[: value.size] = value.ravel()
        return padded[first:last]

    def _register_backward_hooks(self) -> None:
        self.sliced = [parameter for parameter in self._ori_parameter_list if parameter.name in self._param2buffer]
        for number, parameter in enumerate(self.sliced):
            parameter._register_backward_hook(_hook(self._collect, number))

    def _collect(self, number: int) -> None:
        self._get_allreduce_fn(self.sliced[number])()

    def _note(self, name: str) -> None:
        self.reached.add(name)

    @paddle.no_grad()
    def _update_params_slice(self) -> None:
        """Give the optimizer what has a gradient: slices, and parameters that are not cut."""
        self.average()
        trained = []
        for parameter in self.sliced:
            if parameter.bw_storage is not None:
                parameter.fw_storage = stage3._TensorWrapper(parameter)
                parameter.fw_storage._copy_gradient_from(parameter.bw_storage)
                trained.append(parameter.fw_storage)
        trained += [parameter for parameter in self.whole if parameter.name in self.reached]
        self._optim._parameter_list = self._optim._param_groups = trained

    @paddle.no_grad()
    def _clear_gradients(self) -> None:
        for parameter in self.sliced:
            if parameter.bw_storage is not None:
                parameter.fw_storage.clear_gradient(False)
                parameter.bw_storage = None
        for storage in self._grad_storages.values():
            storage.buffer.zero_()
        self.reached.clear()
        self.averaged = False


class GlobalNormClip:
    """Scale gradients so that their norm over the whole `group`, in which each rank has some, is at most `clip_norm`."""

    def __init__(self, clip_norm: float, group: Any):
        self.clip_norm, self.group = clip_norm, group

    @paddle.no_grad()
    def __call__(self, pairs: list[tuple[Tensor, Tensor | None]]) -> list[tuple[Tensor, Tensor | None]]:
        """Pairs of parameter and gradient, in place; `unslice` is paddle's mark of what stage 3 does not cut."""
        found = [(parameter, grad) for parameter, grad in pairs if grad is not None]
        parts = [grad for parameter, grad in found if not hasattr(parameter, "unslice")]
        whole = [grad for parameter, grad in found if hasattr(parameter, "unslice")]
        norm = _global_norm(parts, whole, self.group)
        limit = paddle.full([], self.clip_norm, norm.dtype)
        for _, grad in found:
            grad.multiply_((limit / paddle.maximum(norm, limit)).astype(grad.dtype))
        return pairs


def can_be_cut(name: str, layer: nn.Layer) -> bool:
    """Whether stage 3 may cut the matrix of `layer`, a model's sublayer of that name."""
    is_linear = isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in READ_BY_PARENT
    return is_linear and not layer.weight.stop_gradient


def _hook(method: Callable[[T], None], argument: T) -> Callable[..., None]:
    """What a parameter calls when its gradient is there; it keeps neither the method's object nor a parameter in memory."""
    weak = weakref.WeakMethod(method)

    def call(*_: Any) -> None:
        found = weak()
        if found:
            found(argument)

    return call


def _clip_alike(optimizer: Any, group: Any) -> None:
    if optimizer._grad_clip is not None:
        optimizer._grad_clip = GlobalNormClip(optimizer._grad_clip.clip_norm, group)


def _copies(groups: Any) -> list[Any]:
    """The groups of ranks that keep the same share as this one: those with other samples, and those of its tensor group.

    The latter have the same gradients but for what GPUs round differently each time; without a mean they would drift apart.
    """
    return [group for group in (groups.get_data_parallel_group(), groups.get_model_parallel_group()) if group.nranks > 1]


def _average(grad: Tensor, copies: list[Any], *, summed: int = 1) -> None:
    """From the sum over `summed` ranks to the mean over these and all `copies`."""
    for group in copies:
        dist.all_reduce(grad, group=group)
    grad.scale_(1 / (summed * math.prod(group.nranks for group in copies)))


def _global_norm(parts: Iterable[Tensor], whole: Iterable[Tensor], group: Any) -> Tensor:
    """Norm of gradients of which each rank of `group` has its `parts`, while `whole` is the same on every rank."""
    total = _squares(parts)
    dist.all_reduce(total, group=group)
    return paddle.sqrt(total + _squares(whole))


def _squares(tensors: Iterable[Tensor]) -> Tensor:
    found = [(tensor.astype("float32") ** 2).sum() for tensor in tensors]
    return paddle.add_n(found) if found else paddle.zeros([])
