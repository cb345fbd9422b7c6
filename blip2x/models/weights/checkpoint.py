"""Reading blip2x checkpoints: folders with model.safetensors, tokenizers, and manifest.json, which lists both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from paddle import Tensor, nn
from safetensors import SafetensorError, safe_open

from blip2x.errors import UserError

FORMAT = 1
MANIFEST, MODEL_FILE = "manifest.json", "model.safetensors"

Reasons = Iterable[tuple[str, str]]  # (how a tensor's name starts, why it may be left out)
Adapt = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (array, wanted shape) -> array of that shape


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were set, and which were left out for what reason."""

    folder: Path
    loaded: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)  # in the file, not in the model: name -> reason
    missing: dict[str, str] = field(default_factory=dict)  # in the model, not in the file: name -> reason

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors from {self.folder}"]
        for what, names in (("dropped", self.dropped), ("not in it", self.missing)):
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


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint: every file it lists is there with the recorded sha256.

    Raises:
        UserError: there is no checkpoint, it is of another format, or a file is missing or was changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: there is no such folder")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"no checkpoint at {folder}: it has no {MANIFEST} (a checkpoint that was not finished has none)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["format"], {name: entry["sha256"] for name, entry in manifest["files"].items()}
        _ = manifest["tensors"], manifest["frozen"]["origin"]  # their absence is damage, too
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the checkpoint again") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version!r}; this version of blip2x reads format {FORMAT}")
    for name, recorded in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing from the checkpoint; copy the checkpoint again")
        if sha256(file) != recorded:
            raise UserError(f"{file} is damaged: its sha256 is not the one in {MANIFEST}; copy the checkpoint again")
    return manifest


def load_checkpoint(
    folder: str | Path,
    layer: nn.Layer,
    *,
    prefix: str = "",
    drop: Reasons = (),
    allow_missing: Reasons = (),
    adapt: Mapping[str, Adapt] | None = None,
) -> LoadReport:
    """Set the parameters and buffers of `layer` from a checkpoint; nothing is set unless everything fits.

    Args:
        folder: the checkpoint.
        layer: what to fill, by structured names.
        prefix: cut off the file's names that start with it, to load a part's tensors into that part alone.
        drop: tensors of the file that `layer` may lack, each with its reason.
        allow_missing: tensors of `layer` that the file may lack, each with its reason.
        adapt: by name, how to bring a tensor to another shape, e.g. positions of another image size.

    Raises:
        UserError: no whole checkpoint, a name too many or too few, or a shape or type that differs; it names them.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    kept, frozen = split_state(layer)
    targets = {**kept, **frozen}
    stored = {name.removeprefix(prefix): name for name in manifest["tensors"]}
    report = LoadReport(folder)
    _explain(stored.keys() - targets.keys(), drop, report.dropped, f"{folder} has tensors that the model lacks")
    hint = _origin_hint(manifest, prefix)
    _explain(targets.keys() - stored.keys(), allow_missing, report.missing, f"{folder} lacks tensors of the model{hint}")
    arrays = _read_arrays(folder / MODEL_FILE, {name: stored[name] for name in targets if name in stored})
    for name, array in arrays.items():
        wanted = tuple(targets[name].shape)
        if array.shape != wanted and adapt and name in adapt:
            arrays[name] = array = adapt[name](array, wanted)
        dtype = str(targets[name].dtype).removeprefix("paddle.")
        if array.shape != wanted or str(array.dtype) != dtype:
            raise UserError(
                f"{folder}: {name} is {array.dtype} {list(array.shape)} in the file, but {dtype} {list(wanted)} in the model"
            )
    for name, array in arrays.items():
        targets[name].set_value(array)
        report.loaded.append(name)
    return report


def frozen_origins(folder: str | Path) -> dict[str, str]:
    """Part -> where its frozen weights come from, as recorded when the checkpoint was saved."""
    return dict(read_manifest(folder)["frozen"]["origin"])


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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


def _origin_hint(manifest: dict[str, Any], prefix: str) -> str:
    origin = manifest["frozen"]["origin"]
    if not origin:
        return ""
    parts = ", ".join(f"{part.removeprefix(prefix)} from {where}" for part, where in origin.items())
    return f" (left out because they were frozen: {parts})"


def _read_arrays(path: Path, names: dict[str, str]) -> dict[str, np.ndarray]:
    arrays = {}
    current = ""
    try:
        with safe_open(path, framework="np") as file:
            for name, current in names.items():
                arrays[name] = file.get_tensor(current)
    except (SafetensorError, OSError) as error:
        where = f", tensor {current}" if current else ""
        raise UserError(f"{path}{where}: cannot be read ({error}); copy the checkpoint again") from error
    return arrays
