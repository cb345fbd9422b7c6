"""Writing checkpoints: only what was trained, and never half of it under the final name."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from paddle import nn

import blip2x
from blip2x.engine.folders import require_space
from blip2x.engine.training_state import TrainingState
from blip2x.errors import UserError
from blip2x.models.weights.checkpoint import is_below, split_state, stored_parameter
from blip2x.models.weights.manifest import FORMAT, MANIFEST, MODEL_FILE, sha256
from blip2x.models.weights.stored import StoredTensor
from blip2x.models.weights.write import write_safetensors

_BESIDE_TENSORS = 2**24  # bytes: tokenizers and manifest


class Saveable(Protocol):
    """A tokenizer: writes itself into a folder that it makes."""

    def save(self, folder: Path) -> Any:
        """Write the files."""


def require_checkpoint_space(folder: str | Path, layer: nn.Layer, *, optimizer: bool = False) -> None:
    """Raise `UserError` unless a checkpoint of `layer` fits on the disk of `folder`, beside an older one that it replaces.

    With `optimizer`, AdamW's two moments of what is trained are counted, too.
    """
    require_space(Path(folder), checkpoint_bytes(layer, optimizer=optimizer))


def checkpoint_bytes(layer: nn.Layer, *, optimizer: bool) -> int:
    """What a checkpoint of `layer` takes at most; `optimizer` as of `require_checkpoint_space`."""
    kept, _ = split_state(layer)
    weights = sum(tensor.size * tensor.element_size() for tensor in kept.values())
    return weights * (3 if optimizer else 1) + _BESIDE_TENSORS


def save_checkpoint(folder: str | Path, layer: nn.Layer, **about: Any) -> Path:
    """Write what `prepare_checkpoint` prepares at once."""
    return prepare_checkpoint(folder, layer, **about)()


def prepare_checkpoint(
    folder: str | Path,
    layer: nn.Layer,
    *,
    kind: str,
    step: int,
    extra: dict[str, Any] | None = None,
    tokenizers: dict[str, Saveable] | None = None,
    frozen_origin: dict[str, str] | None = None,
    state: TrainingState | None = None,
    copy: bool = False,
) -> Callable[[], Path]:
    """What writes the trained parameters and buffers of `layer`; an older checkpoint is replaced once the new one is whole.

    Args:
        folder: the checkpoint's folder.
        layer: the model (not the objective), with its parts frozen as in training.
        kind: what the checkpoint is of, e.g. the task.
        step: optimizer steps done.
        extra: anything that JSON can hold.
        tokenizers: by part; each goes to ``tokenizers/<part>``.
        frozen_origin: part ("vision") -> where its frozen weights can be loaded from.
        state: for a training that may go on from here.
        copy: the layer may change before it is written, what is written is what it is now.

    Raises:
        UserError: a frozen tensor has no origin, so that its weights would be lost, or the disk is full.
    """
    folder = Path(folder)
    frozen_origin = frozen_origin or {}
    kept, frozen = split_state(layer)
    lost = [name for name in frozen if not is_below(name, frozen_origin)]
    if lost:
        raise UserError(
            f"{lost[0]} is frozen, so it is not saved, and nothing says where its weights come from ({len(lost)} tensors): "
            "give that part weights, or train it with frozen=false"
        )
    require_checkpoint_space(folder, layer, optimizer=state is not None)
    tensors = {name: stored_parameter(name, tensor) for name, tensor in kept.items()}
    if copy:
        tensors = {name: _copied(tensor) for name, tensor in tensors.items()}
    return partial(
        write_checkpoint,
        folder,
        tensors,
        kind=kind,
        step=step,
        extra=extra or {},
        tokenizers=tokenizers or {},
        frozen={"names": list(frozen), "origin": frozen_origin},
        state=state,
    )


def _copied(tensor: StoredTensor) -> StoredTensor:
    array = np.array(tensor.open())
    return replace(tensor, open=lambda: array)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    *,
    kind: str,
    step: int,
    extra: dict[str, Any],
    tokenizers: Mapping[str, Saveable],
    frozen: dict[str, Any],
    state: TrainingState | None = None,
) -> Path:
    """Write `tensors` one by one; the other arguments as of `prepare_checkpoint`, `frozen` the names that are left out."""
    with whole_folder(folder) as new:
        write_safetensors(new / MODEL_FILE, tensors)
        for part, tokenizer in tokenizers.items():
            tokenizer.save(new / "tokenizers" / part)
        if state:
            state.write(new)
        files = sorted(path for path in new.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "blip2x": blip2x.__version__,
            "kind": kind,
            "step": step,
            "tensors": {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in tensors.items()},
            "frozen": frozen,
            "files": {str(path.relative_to(new)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
            "extra": extra,
        }
        # last: without it the folder is no checkpoint
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends without an error; an older one is replaced then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed while saving
    new.mkdir()
    try:
        yield new
    except Exception:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for path in sorted(new.rglob("*"), reverse=True):  # a folder after what is in it
        _sync(path)
    _sync(new)
    _put_in_place(new, folder)


def _put_in_place(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    _sync(folder.parent)
    shutil.rmtree(new, ignore_errors=True)  # where the two were exchanged, the older one


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step, so that no reader finds neither; false where the system cannot do that."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0  # some network file systems refuse


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
