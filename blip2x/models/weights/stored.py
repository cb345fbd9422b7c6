"""A tensor in a file: shape and type are known at once, the numbers are mapped into memory only while they are looked at."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from blip2x.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # which numpy has not
_LARGEST = 1e30  # no weight is that large; a flipped exponent bit is


@dataclass(frozen=True)
class StoredTensor:
    """Numbers in a file, or made from those by a change of layout.

    `open` gives an array that may be a view of the mapped file: let it go before the next one is opened, and only one tensor
    at a time is in memory.
    """

    where: str  # the file and the tensor's name in it
    shape: tuple[int, ...]
    dtype: np.dtype
    open: Callable[[], np.ndarray]

    @classmethod
    def of(cls, where: str, array: np.ndarray) -> StoredTensor:
        """An array that is in memory already."""
        return cls(where, array.shape, array.dtype, lambda: array)

    def changed(self, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> StoredTensor:
        """The tensor after `change`, which gives it `shape`; nothing is read yet."""
        return replace(self, shape=shape, open=lambda: change(self.open()))

    def read(self) -> np.ndarray:
        """A copy of the numbers in their stored type.

        Raises:
            UserError: the file is damaged here; it names the tensor.
        """
        return np.array(self.open())


def is_real(dtype: np.dtype) -> bool:
    """Whether it is a type of real numbers, bfloat16 included."""
    return dtype.kind == "f" or dtype == BFLOAT16


def size_of(tensor: StoredTensor) -> int:
    """Bytes in a file."""
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def require_finite(array: np.ndarray, where: str) -> None:
    """Raise `UserError` where numbers are no weights; formats without checksums show a flipped bit only so."""
    if not is_real(array.dtype):
        return
    with np.errstate(all="ignore"):
        total = array.sum(dtype=np.float32)
    if np.isfinite(total) and abs(total) < _LARGEST:
        return
    raise UserError(
        f"{where} holds numbers that are no weights (nan, infinite or above {_LARGEST:g}); copy or download it again"
    )


def mapped(path: Path, where: str, *, offset: int, shape: tuple[int, ...], dtype: np.dtype, crc: int | None) -> StoredTensor:
    """A tensor that stands in a file as it is, with the crc32 of its bytes where that is recorded.

    Raises:
        UserError: when it is opened: the file ends before it, or its bytes have another checksum.
    """

    def read() -> np.ndarray:
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < offset + length:
                raise UserError(f"{where}: the file is cut off in this tensor; copy or download it again")
            if not length:
                return np.empty(shape, dtype)
            before = offset % mmap.ALLOCATIONGRANULARITY  # what of the first page is another tensor's
            # numpy.memmap does the same at ten times the cost, which hundreds of small tensors feel
            pages = mmap.mmap(file.fileno(), before + length, access=mmap.ACCESS_READ, offset=offset - before)
        flat = np.frombuffer(pages, dtype="u1", offset=before)
        if crc is not None and zlib.crc32(flat) != crc:
            raise UserError(f"{where} is damaged: its checksum is not the recorded one; copy or download the file again")
        return flat.view(dtype).reshape(shape)

    return StoredTensor(where, shape, dtype, read)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file beside weights.

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
