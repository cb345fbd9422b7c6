"""Writing checkpoints: only what was trained, and never half of it under the final name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from paddle import nn

import blip2x
from blip2x.engine.folders import require_space
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


def require_checkpoint_space(folder: str | Path, layer: nn.Layer) -> None:
    """Raise `UserError` unless a checkpoint of `layer` fits on the disk of `folder`, beside an older one that it replaces."""
    kept, _ = split_state(layer)
    require_space(Path(folder), sum(tensor.size * tensor.element_size() for tensor in kept.values()) + _BESIDE_TENSORS)


def save_checkpoint(
    folder: str | Path,
    layer: nn.Layer,
    *,
    kind: str,
    step: int,
    extra: dict[str, Any] | None = None,
    tokenizers: dict[str, Saveable] | None = None,
    frozen_origin: dict[str, str] | None = None,
) -> Path:
    """Write the trained parameters and buffers of `layer`; a checkpoint of that name is replaced once the new one is whole.

    Args:
        folder: the checkpoint's folder.
        layer: the model (not the objective), with its parts frozen as in training.
        kind: what the checkpoint is of, e.g. the task.
        step: optimizer steps done.
        extra: anything that JSON can hold.
        tokenizers: by part; each goes to ``tokenizers/<part>``.
        frozen_origin: part ("vision") -> where its frozen weights can be loaded from.

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
    require_checkpoint_space(folder, layer)
    tensors = {name: stored_parameter(name, tensor) for name, tensor in kept.items()}
    return write_checkpoint(
        folder,
        tensors,
        kind=kind,
        step=step,
        extra=extra or {},
        tokenizers=tokenizers or {},
        frozen={"names": list(frozen), "origin": frozen_origin},
    )


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, StoredTensor],
    *,
    kind: str,
    step: int,
    extra: dict[str, Any],
    tokenizers: Mapping[str, Saveable],
    frozen: dict[str, Any],
) -> Path:
    """Write `tensors` one by one; the other arguments as of `save_checkpoint`, `frozen` the names that are left out."""
    with whole_folder(folder) as partial:
        write_safetensors(partial / MODEL_FILE, tensors)
        for part, tokenizer in tokenizers.items():
            tokenizer.save(partial / "tokenizers" / part)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {
            "format": FORMAT,
            "blip2x": blip2x.__version__,
            "kind": kind,
            "step": step,
            "tensors": {name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype)} for name, tensor in tensors.items()},
            "frozen": frozen,
            "files": {str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files},
            "extra": extra,
        }
        # last: without it the folder is no checkpoint
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends without an error; an older one is replaced then."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while saving
    partial.mkdir()
    try:
        yield partial
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in sorted(path for path in partial.rglob("*") if path.is_file()):
        _sync(path)
    _sync(partial)
    _put_in_place(partial, folder)


def _put_in_place(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
