"""Tensors of a file or a folder by name: safetensors, PyTorch's zip files, Paddle's .pdparams; whole or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from blip2x.errors import UserError
from blip2x.models.weights.pickles import open_paddle, open_torch
from blip2x.models.weights.stored import BFLOAT16, StoredTensor, mapped, read_json

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")  # in order of preference
CRC_KEY = "crc32"  # in the metadata of the safetensors files that we write: name -> checksum, in hexadecimal
SAFETENSORS_TYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def open_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a weight file, or of all weight files in a folder; no numbers are read before they are asked for.

    Raises:
        UserError: there are no weights, a shard is missing, or a file is damaged or holds something else than tensors.
    """
    path = Path(path)
    tensors: dict[str, StoredTensor] = {}
    for file in [path] if path.is_file() else _weight_files(path):
        if not file.is_file():
            raise UserError(f"{file} is missing: the index beside it lists this file; copy it into the folder")
        try:
            found = _open_file(file)
        except UserError:
            raise
        except Exception as error:  # a damaged pickle ends in all sorts of exceptions
            raise UserError(f"{file} cannot be read as weights ({error}); copy or download it again") from error
        twice = tensors.keys() & found.keys()
        if twice:
            raise UserError(f"{file} holds {min(twice)}, which another file of {path} has as well; copy or download the folder")
        tensors |= found
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for name in WHOLE_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{index} has no weight_map; copy or download it again")
            strange = [shard for shard in shards.values() if not isinstance(shard, str) or Path(shard).name != shard]
            if strange:
                raise UserError(f"{index} lists {strange[0]!r}, which is no file of this folder; copy or download it again")
            return [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"no weights in {folder}: put the files of the Hugging Face repository there (model.safetensors or pytorch_model.bin, "
        "or their shards with the index, and config.json), or PaddleMIX's model_state.pdparams"
    )


def _open_file(path: Path) -> dict[str, StoredTensor]:
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    content = open_paddle(path) if path.suffix == ".pdparams" else open_torch(path)
    if isinstance(content.get("model"), dict):  # LAVIS: the optimizer, the epoch and more stand beside it
        content = content["model"]
    elif isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    others = [name for name, value in content.items() if not isinstance(value, StoredTensor)]
    if others:
        raise UserError(f"{path} holds something else than named tensors: {others[0]}")
    return content


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if 8 + length + entry["data_offsets"][1] > path.stat().st_size:
            raise UserError(f"{path}, tensor {name}: the file is cut off in or before this tensor; copy or download it again")
    with safe_open(path, framework="np") as file:  # refuses a header that contradicts itself
        recorded = json.loads((file.metadata() or {}).get(CRC_KEY, "{}"))
    tensors = {}
    for name, entry in header.items():
        where = f"{path}, tensor {name}"
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise UserError(f"{where} has numbers of type {entry['dtype']}, which blip2x does not read")
        crc = int(recorded[name], 16) if name in recorded else None
        tensors[name] = mapped(
            path,
            where,
            offset=8 + length + entry["data_offsets"][0],
            shape=tuple(entry["shape"]),
            dtype=SAFETENSORS_TYPES[entry["dtype"]],
            crc=crc,
        )
    return tensors
