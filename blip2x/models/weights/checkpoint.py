"""From stored tensors to a model's parameters: strict in names and shapes, tensor by tensor into memory that is there once."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor, nn

from blip2x.errors import UserError
from blip2x.models.compact import Compact, compact_of, quantise
from blip2x.models.tensor_parallel import Where, share_of
from blip2x.models.weights.source import Source, open_source
from blip2x.models.weights.stored import BFLOAT16, StoredTensor, is_real, require_finite, size_of
from blip2x.startup import kernel_threads

Reasons = Iterable[tuple[str, str]]  # (how a tensor's name starts, why it may be left out)
Adapt = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (array, wanted shape) -> array of that shape

_BLOCK = 256  # rows and columns; two blocks fit into a core's cache
_THREADS = 4  # at most; more would wait for memory


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were set, and which were left out for what reason."""

    where: str
    loaded: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # in the file, not in the model: name -> reason
    missing: dict[str, str] = field(default_factory=dict)  # in the model, not in the file: name -> reason
    adapted: dict[str, str] = field(default_factory=dict)  # brought to the model's shape: name -> how

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.where}"]
        for what, names in (("dropped", self.dropped), ("not in it", self.missing), ("adapted", self.adapted)):
            for reason in dict.fromkeys(names.values()):
                parts.append(f"{sum(r == reason for r in names.values())} {what} ({reason})")
        return "; ".join(parts)


def split_state(layer: nn.Layer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of `layer` by structured name, shared parameters once: (those a checkpoint holds, those that are frozen).

    Frozen are parameters without gradient and everything inside a sublayer marked `is_frozen`.
    """
    frozen_parts = [path for path, sub in layer.named_sublayers(include_self=True) if getattr(sub, "is_frozen", False)]
    in_state_dict = layer.state_dict().keys()  # buffers that are recomputed are not
    kept, frozen = {}, {}
    for name, parameter in layer.named_parameters():
        (frozen if parameter.stop_gradient or is_below(name, frozen_parts) else kept)[name] = parameter
    for name, buffer in layer.named_buffers():
        if name in in_state_dict:
            (frozen if is_below(name, frozen_parts) else kept)[name] = buffer
    return kept, frozen


def is_below(name: str, parts: Iterable[str]) -> bool:
    """Whether tensor `name` belongs to one of `parts`: "vision" has "vision.x", but not "vision_proj.x"; "" has all."""
    return any(part == "" or name == part or name.startswith(part + ".") for part in parts)


def load_checkpoint(
    folder: str | Path,
    layer: nn.Layer,
    *,
    prefix: str = "",
    drop: Reasons = (),
    allow_missing: Reasons = (),
    adapt: Mapping[str, Adapt] | None = None,
) -> LoadReport:
    """`fill` from all that stands at `folder`, a source of any family; `prefix` is cut off the names that start with it.

    Raises:
        UserError: as `open_source` and `fill`.
    """
    source = open_source(folder)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
    return fill(
        layer, tensors, str(folder), drop=drop, allow_missing=allow_missing, adapt=adapt, hint=_origin_hint(source, prefix)
    )


def fill(
    layer: nn.Layer,
    tensors: Mapping[str, StoredTensor],
    where: str,
    *,
    drop: Reasons = (),
    allow_missing: Reasons = (),
    adapt: Mapping[str, Adapt] | None = None,
    grows: Collection[str] = (),
    hint: str = "",
) -> LoadReport:
    """Set the parameters and buffers of `layer`; nothing is set unless all names and shapes fit.

    A layer built under ``paddle.LazyGuard`` gets its memory here. Numbers are written where they stay, in the parameter's own
    type; what the tensors lack and may lack is initialised as the layer says. On a CPU some tensors are read at a time, which
    together are no larger than the largest one. Of a parameter that is split over ranks, shapes and `adapt` mean the whole, and
    this rank's share is written.

    Args:
        layer: what to fill, by structured names.
        tensors: by the same names.
        where: what the tensors are from, for messages.
        drop: tensors that `layer` may lack, each with its reason.
        allow_missing: tensors of `layer` that may be absent, each with its reason.
        adapt: by name, how to bring a tensor to another shape, e.g. positions of another image size.
        grows: names of which the layer may have more rows; those behind the stored ones are initialised.
        hint: added to the message about absent tensors.

    Raises:
        UserError: a name too many or too few, a shape that differs, or a damaged tensor; it names them.
    """
    kept, frozen = split_state(layer)
    targets = {**kept, **frozen}
    report = LoadReport(where)
    _explain(tensors.keys() - targets.keys(), drop, report.dropped, f"{where} has tensors that the model lacks")
    _explain(targets.keys() - tensors.keys(), allow_missing, report.missing, f"{where} lacks tensors of the model{hint}")
    adapted: dict[str, np.ndarray] = {}
    for name, target in targets.items():
        if name not in tensors:
            continue
        found, wanted = tensors[name].shape, _whole_shape(target)
        if found != wanted and adapt and name in adapt:
            adapted[name] = adapt[name](tensors[name].read(), wanted)
            found = adapted[name].shape
        if found != wanted and not (name in grows and found[1:] == wanted[1:] and found[0] < wanted[0]):
            raise UserError(f"{tensors[name].where}: {name} is {list(found)} in the file, but {list(wanted)} in the model")
        if found != tensors[name].shape:
            report.adapted[name] = f"{list(tensors[name].shape)} to {list(wanted)}"
        elif found != wanted:
            report.adapted[name] = f"{wanted[0] - found[0]} rows are new"
        if is_real(tensors[name].dtype) != (is_real(_numpy_type(target)) or compact_of(target) is not None):
            raise UserError(
                f"{tensors[name].where}: {name} is {tensors[name].dtype} in the file, but {_numpy_type(target)} in the model"
            )
    at_once = max((size_of(tensors[name]) for name in targets if name in tensors), default=0)
    with _Writers(at_once) as writers:
        for name, target in targets.items():
            whole = (name in tensors and tensors[name].shape[:1] == _whole_shape(target)[:1]) or name in adapted
            _give_memory(target, initialise=not whole)
            if name not in tensors:
                continue
            tensor = tensors[name]
            if name in adapted:
                tensor = StoredTensor.of(tensor.where, adapted.pop(name))
            writers.write(target, tensor)
            report.loaded.append(name)
            del tensor
    return report


class _Writers:
    """Writes parameters, on a CPU several at a time: checksums, conversion and sums leave the interpreter's lock.

    At its end all are written, or the first error is raised.

    Args:
        at_once: bytes of stored tensors that are in memory together, at most.
    """

    def __init__(self, at_once: int):
        self._at_once, self._begun = at_once, 0
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._pool = ThreadPoolExecutor(min(_THREADS, kernel_threads()))

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while kind is None and self._waiting:
                self._finish_one()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, target: Tensor, tensor: StoredTensor) -> None:
        """Have a parameter written, once there is room for the tensor."""
        alone, size = not target.place.is_cpu_place(), size_of(tensor)
        while self._waiting and (alone or self._begun + size > self._at_once):
            self._finish_one()
        if alone:  # Paddle's own operations, which stay in this thread
            _read_into(target, tensor)
            return
        self._begun += size
        self._waiting.append((self._pool.submit(_read_into, target, tensor), size))

    def _finish_one(self) -> None:
        done, size = self._waiting.popleft()
        self._begun -= size
        done.result()


def _read_into(target: Tensor, tensor: StoredTensor) -> None:
    _write(target, tensor.open(), tensor.where)


def _give_memory(target: Tensor, *, initialise: bool) -> None:
    """Memory for a parameter built without; numbers are drawn, which takes minutes at full size, only where they stay."""
    if target._is_initialized():
        return
    if initialise:
        target.initialize()
    else:
        paddle.empty(target.shape, dtype=target.dtype)._share_buffer_to(target)


def _whole_shape(target: Tensor) -> tuple[int, ...]:
    share = share_of(target)
    return tuple(target.shape) if share is None else share.whole


def _write(target: Tensor, array: np.ndarray, where: str) -> None:
    """Numbers into a parameter's first rows, or its share of them, converted on the way; on a CPU without a copy between."""
    share, on_cpu, dtype = share_of(target), target.place.is_cpu_place(), _numpy_type(target)
    compact = compact_of(target)
    if on_cpu:
        to = _view(target)
    elif share is None and array.ndim and len(array) < target.shape[0]:
        to = target.numpy().view(dtype)
    else:
        to = np.empty(target.shape, dtype)
    if share is None:
        pieces = [(..., slice(len(array)) if array.ndim else ...)]
    else:
        pieces = share.pieces()
        if share.is_padded:
            to[...] = 0
    if compact is not None and compact.scale is not None:
        _write_int8(compact, array, to, pieces if share else [((...,), (...,))], where)
    else:
        for piece, place in pieces:
            _copy(array[piece], to[place])
            require_finite(to[place], where)
    if not on_cpu:
        target.set_value(to.view(np.uint16) if dtype == BFLOAT16 else to)  # which Paddle gives and takes as whole numbers


def _copy(array: np.ndarray, to: np.ndarray) -> None:
    """Numbers to another type, and perhaps transposed: block by block, since NumPy would go through memory crosswise."""
    if array.ndim != 2 or array.strides[1] == array.itemsize:  # of some columns, too
        to[...] = array
        return
    stored = array.T
    for row in range(0, stored.shape[0], _BLOCK):
        rows = stored[row : row + _BLOCK].astype(to.dtype)
        for column in range(0, stored.shape[1], _BLOCK):
            to[column : column + _BLOCK, row : row + _BLOCK] = rows[:, column : column + _BLOCK].T


def _write_int8(compact: Compact, array: np.ndarray, to: np.ndarray, pieces: Iterable[tuple[Where, Where]], where: str) -> None:
    """Numbers as int8, with the scales of their outputs; some outputs at a time, so that no whole copy is made."""
    scale_M = np.zeros(compact.scale.shape, np.float32)
    for piece, place in pieces:
        outputs = place[compact.outputs] if len(place) > compact.outputs else ...
        rows, stored, scale = (array[piece], to[place], scale_M[outputs])
        if compact.outputs == 1:
            rows, stored = rows.T, stored.T
        for start in range(0, len(rows), _BLOCK):
            own = slice(start, start + _BLOCK)
            stored[own], scale[own] = quantise(rows[own])
    require_finite(scale_M, where)
    if compact.scale.place.is_cpu_place():
        _view(compact.scale)[...] = scale_M  # Paddle's own operations would have to stay in one thread
    else:
        compact.scale.set_value(scale_M)


def _view(target: Tensor) -> np.ndarray:
    """The parameter's own memory."""
    dtype = _numpy_type(target)
    if not target.size:
        return np.empty(target.shape, dtype)
    buffer = (ctypes.c_char * (target.size * dtype.itemsize)).from_address(target.data_ptr())
    return np.frombuffer(buffer, dtype=dtype).reshape(target.shape)


def stored_parameter(name: str, tensor: Tensor) -> StoredTensor:
    """A parameter to be written; it is copied out of the model when its turn comes.

    Raises:
        ValueError: this rank has only a share of it, which would be written as if it were the whole.
    """
    if share_of(tensor) is not None:
        raise ValueError(f"{name} is split over {share_of(tensor).size} ranks and cannot be saved by one")
    dtype = _numpy_type(tensor)
    return StoredTensor(name, tuple(tensor.shape), dtype, lambda: tensor.numpy().view(dtype))  # paddle gives bfloat16 as uint16


def _numpy_type(target: Tensor) -> np.dtype:
    name = str(target.dtype).removeprefix("paddle.")
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def _explain(names: Iterable[str], reasons: Reasons, into: dict[str, str], complaint: str) -> None:
    reasons = list(reasons)
    unexplained = []
    for name in sorted(names):
        reason = next((why for prefix, why in reasons if name.startswith(prefix)), None)
        if reason is None:
            unexplained.append(name)
        else:
            into[name] = reason
    if unexplained:
        more = f" and {len(unexplained) - 5} more" if len(unexplained) > 5 else ""
        raise UserError(f"{complaint}: {', '.join(unexplained[:5])}{more}")


def _origin_hint(source: Source, prefix: str) -> str:
    origin = source.manifest["frozen"]["origin"] if source.manifest else None
    if not origin:
        return ""
    parts = ", ".join(f"{part.removeprefix(prefix)} from {where}" for part, where in origin.items())
    return f" (left out because they were frozen: {parts})"
