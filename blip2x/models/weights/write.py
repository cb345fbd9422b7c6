"""Writing safetensors tensor by tensor: never more than one in memory, with a checksum for each."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from blip2x.errors import UserError
from blip2x.models.weights.stored import StoredTensor, size_of
from blip2x.models.weights.tensor_files import CRC_KEY, SAFETENSORS_TYPES

_CODES = {dtype: code for code, dtype in SAFETENSORS_TYPES.items()}
_ALIGNMENT = 64  # so that a mapped tensor starts at a whole number of its elements


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` in their types; the file is whole only when this returns.

    Raises:
        UserError: a type that safetensors has not, or a damaged source.
    """
    header, offset = {}, 0
    # as the format's own library orders them: wide types first, so that every tensor is aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise UserError(f"{tensor.where} has numbers of type {tensor.dtype}, which safetensors does not write")
        size = size_of(tensor)
        code, offsets = _CODES[tensor.dtype], [offset, offset + size]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": offsets}
        offset += size
    checksums = dict.fromkeys(names, "0" * 8)
    length = len(_header(header, metadata, checksums))
    with path.open("wb") as file:
        file.seek(8 + length)
        for name in names:
            content = np.ascontiguousarray(tensors[name].open()).reshape(-1).view("u1")
            checksums[name] = f"{zlib.crc32(content):08x}"
            file.write(content.data)
        file.seek(0)
        file.write(length.to_bytes(8, "little") + _header(header, metadata, checksums))


def _header(header: dict, metadata: Mapping[str, str] | None, checksums: dict[str, str]) -> bytes:
    about = {**(metadata or {}), CRC_KEY: json.dumps(checksums)}
    text = json.dumps({"__metadata__": about, **header}, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % _ALIGNMENT)
