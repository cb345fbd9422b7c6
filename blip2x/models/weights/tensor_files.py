"""Tensors of a Hugging Face folder, one at a time: safetensors or PyTorch's zip files, whole or sharded.

PyTorch's format holds a pickle, which can call anything when it is read; here it can call what makes up a tensor and no more.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from blip2x.errors import UserError

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference; "<name>.index.json" lists shards
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # which numpy has not
STORAGE_TYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # as float32, unless it holds whole numbers


def open_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Name -> tensor of all weight files in a folder; nothing is read before it is asked for.

    Raises:
        UserError: there are no weights, a shard is missing, or a file is damaged or holds something else than tensors.
    """
    folder = Path(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise UserError(f"{path} is missing: the index beside it lists this file; copy it into the folder")
        try:
            tensors |= _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
        except UserError:
            raise
        except Exception as error:  # a damaged pickle ends in all sorts of exceptions
            raise UserError(f"{path} cannot be read as weights ({error}); copy or download it again") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a Hugging Face folder.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not names with values; copy or download it again")
    return content


def _weight_files(folder: Path) -> list[Path]:
    for name in WHOLE_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index} has no weight_map; copy or download it again")
            return [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"no weights in {folder}: put the files of the Hugging Face repository there ({' or '.join(WHOLE_FILES)}, or their "
        "shards with the index, and config.json)"
    )


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    with safe_open(path, framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    return {name: StoredTensor(shape, partial(_read_slice, path, name)) for name, shape in shapes.items()}


def _read_slice(path: Path, name: str) -> np.ndarray:
    with safe_open(path, framework="np") as file:
        return _as_float32(file.get_tensor(name))


def _as_float32(array: np.ndarray) -> np.ndarray:
    """Whole numbers and truth values stay what they are."""
    return array.astype(np.float32) if array.dtype == BFLOAT16 or array.dtype.kind == "f" else np.ascontiguousarray(array)


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    with zipfile.ZipFile(path) as archive:
        entry = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if entry is None:
            raise UserError(f"{path} is not a file that torch.save of PyTorch 1.6 or later has written")
        with archive.open(entry) as file:
            content = _TensorUnpickler(file, path, entry.removesuffix("data.pkl")).load()
    if not isinstance(content, dict) or not all(isinstance(tensor, StoredTensor) for tensor in content.values()):
        raise UserError(f"{path} holds something else than named tensors")
    return content


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds tensors as `StoredTensor` and refuses every other global."""

    def __init__(self, file: Any, path: Path, root: str):
        super().__init__(file)
        self.path, self.root = path, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}:
            return self._rebuild if name == "_rebuild_tensor_v2" else _tensor_of_parameter
        if module == "torch" and name in STORAGE_TYPES:
            return name  # and not the dtype: what a pickle gets hold of, it can also change
        raise UserError(f"{self.path} refers to {module}.{name}, which is no tensor; only load weights from people you trust")

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        _, storage, key, *_ = pid
        return STORAGE_TYPES[storage], key

    def _rebuild(self, storage: tuple[np.dtype, str], offset: int, size: tuple, stride: tuple, *_: Any) -> StoredTensor:
        dtype, key = storage
        entry = f"{self.root}data/{key}"
        return StoredTensor(tuple(size), partial(_read_storage, self.path, entry, dtype, offset, size, stride))


def _tensor_of_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _read_storage(path: Path, entry: str, dtype: np.dtype, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            flat = np.frombuffer(archive.read(entry), dtype=dtype)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise UserError(f"{path}: {entry} cannot be read ({error}); copy or download the file again") from error
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or last >= len(flat):
        raise UserError(f"{path}: {entry} is shorter than its tensor; copy or download the file again")
    array = np.lib.stride_tricks.as_strided(flat[offset:], size, [step * flat.itemsize for step in stride])
    return _as_float32(array)
