"""PyTorch's and Paddle's weight files are pickles, which can call anything when they are read; here they can make tensors only.

A tensor's numbers are not read with the pickle: where they stand in the file is remembered, and mapped when they are asked for.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from blip2x.errors import UserError
from blip2x.models.weights.stored import BFLOAT16, StoredTensor, mapped

_STORAGE_TYPES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": BFLOAT16,
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# what reading a damaged archive ends in; RuntimeError: it seems to be encrypted, or compressed in an unknown way
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, KeyError, OSError, struct.error)
_LARGE = 1 << 16  # bytes: pickle writes larger ones outside of its frames, so that they stand in the file as they are


def open_torch(path: Path) -> dict[str, Any]:
    """Names and values of a file that torch.save wrote; tensors are `StoredTensor`.

    Raises:
        UserError: it refers to anything but tensors and plain containers, or is no such file.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a file that torch.save of PyTorch 1.6 or later has written, or it is cut off")
    with zipfile.ZipFile(path) as archive:
        entry = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if entry is None:
            raise UserError(f"{path} is not a file that torch.save of PyTorch 1.6 or later has written")
        with archive.open(entry) as file:
            content = _TorchUnpickler(file, path, archive, entry.removesuffix("data.pkl")).load()
    return _named(content, path)


def open_paddle(path: Path) -> dict[str, Any]:
    """Names and values of a file that paddle.save wrote (``.pdparams``); tensors are `StoredTensor`.

    Raises:
        UserError: it refers to anything but arrays and plain containers, or is no such file.
    """
    with path.open("rb") as file:
        reader = _PaddleUnpickler(file, path)
        try:
            content = reader.load()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle ends in all sorts of exceptions
            raise UserError(
                f"{path} cannot be read as weights ({error}, near {reader.last_name()}); copy or download it again"
            ) from error
    content = _named(content, path)
    content.pop("StructuredToParameterName@@", None)  # names of Paddle's own, which it counts anew in each process
    return content


def _named(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path} holds a {type(content).__name__}, not names with tensors")
    named = {}
    for name, value in content.items():
        if isinstance(value, _Array):
            value = value.tensor(path, name)
        if isinstance(value, StoredTensor):  # its messages name it, not the place in the archive alone
            value = StoredTensor(f"{path}, tensor {name}", value.shape, value.dtype, partial(_open_named, value, path, name))
        elif isinstance(value, Mapping):  # as LAVIS's "model" beside "optimizer"
            value = _named(value, path) if all(isinstance(inner, str) for inner in value) else value
        named[name] = value
    return named


def _open_named(tensor: StoredTensor, path: Path, name: str) -> np.ndarray:
    try:
        return tensor.open()
    except UserError as error:
        raise UserError(f"tensor {name}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}, tensor {name}: cannot be read ({error}); copy or download the file again") from error


def _refuse(path: Path, module: str, name: str) -> UserError:
    return UserError(f"{path} refers to {module}.{name}, which is no tensor; only load weights from people you trust")


class _TorchUnpickler(pickle.Unpickler):
    """Rebuilds tensors as `StoredTensor` and refuses every other global."""

    def __init__(self, file: Any, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self.path, self.archive, self.root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}:
            return self._rebuild if name == "_rebuild_tensor_v2" else _tensor_of_parameter
        if module == "torch" and name in _STORAGE_TYPES:
            return name  # and not the dtype: what a pickle gets hold of, it can also change
        raise _refuse(self.path, module, name)

    def persistent_load(self, pid: Any) -> tuple[np.dtype, str]:
        _, storage, key, *_ = pid
        return _STORAGE_TYPES[storage], key

    def _rebuild(self, storage: tuple[np.dtype, str], offset: int, size: tuple, stride: tuple, *_: Any) -> StoredTensor:
        dtype, key = storage
        entry = f"{self.root}data/{key}"
        where, size = f"{self.path}: {entry}", tuple(size)
        try:
            member = self.archive.getinfo(entry)  # looked up once: to open the archive reads the entries of all tensors
        except KeyError as error:
            raise UserError(f"{where} is missing; copy or download the file again") from error
        return StoredTensor(where, size, dtype, partial(_open_storage, self.path, member, dtype, offset, size, tuple(stride)))


def _tensor_of_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _open_storage(path: Path, member: zipfile.ZipInfo, dtype: np.dtype, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    flat = _storage(path, member, dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or last >= len(flat):
        if 0 in size and min(offset, *size, *stride) >= 0:
            return np.empty(size, dtype)
        raise UserError(f"{path}: {member.filename} is shorter than its tensor; copy or download the file again")
    return np.lib.stride_tricks.as_strided(flat[offset:], size, [step * flat.itemsize for step in stride], writeable=False)


def _storage(path: Path, member: zipfile.ZipInfo, dtype: np.dtype) -> np.ndarray:
    """The numbers of one archive member, checked against the archive's checksum; mapped, unless somebody compressed it."""
    where = f"{path}: {member.filename}"
    try:
        if member.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(path) as archive:
                return np.frombuffer(archive.read(member.filename), dtype=dtype)
        with path.open("rb") as file:  # the member's own header has lengths that the archive's directory has not
            file.seek(member.header_offset)
            header = file.read(30)
            name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = member.header_offset + 30 + name_length + extra_length
        count = member.file_size // dtype.itemsize
        return mapped(path, where, offset=start, shape=(count,), dtype=dtype, crc=member.CRC).open()
    except _DAMAGED as error:
        raise UserError(f"{where} cannot be read ({error}); copy or download the file again") from error


class _Bytes(NamedTuple):
    """Where bytes stand in the file."""

    offset: int
    length: int


class _Array:
    """Stands for a NumPy array while its pickle is read: keeps the description, makes nothing."""

    def __init__(self) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def tensor(self, path: Path, name: str) -> StoredTensor:
        """The array as a stored tensor; Paddle writes bfloat16 as whole numbers of 16 bits."""
        try:
            _, shape, dtype, is_fortran, content = self.state
            dtype, shape = dtype.numpy(), tuple(int(length) for length in shape)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, tensor {name}: its description is damaged ({error}); copy or download it again"
            ) from error
        if dtype == np.dtype("<u2"):
            dtype = BFLOAT16
        where, stored_shape = f"{path}, tensor {name}", shape[::-1] if is_fortran else shape
        length = content.length if isinstance(content, _Bytes) else len(content)
        if min(shape, default=0) < 0 or length != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
            raise UserError(f"{where}: {length} bytes are not {dtype} {list(shape)}; copy or download the file again")
        if isinstance(content, _Bytes):
            tensor = mapped(path, where, offset=content.offset, shape=stored_shape, dtype=dtype, crc=None)
        else:
            raw = content.encode("latin1") if isinstance(content, str) else content
            tensor = StoredTensor.of(where, np.frombuffer(raw, dtype=dtype).reshape(stored_shape))
        return tensor.changed(shape, np.transpose) if is_fortran else tensor


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = str(code), "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype:
        """The number type; anything but plain numbers is no tensor."""
        dtype = np.dtype(self.code)
        if dtype.kind not in "fiub":
            raise TypeError(f"{self.code} is no type of numbers")
        return dtype if self.order in "|=" else dtype.newbyteorder(self.order)


def _empty_array(*_: Any) -> _Array:
    return _Array()


def _latin1(text: Any, encoding: str = "latin1") -> bytes:
    """Bytes in pickles of protocol 2."""
    return str(text).encode("latin1")


class _PaddleUnpickler(pickle._Unpickler):  # the one in Python: the one in C would read every array into memory
    """Rebuilds arrays as `_Array` and refuses every other global."""

    dispatch = pickle._Unpickler.dispatch.copy()

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file)
        self.source, self.path, self.size = file, path, path.stat().st_size

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return "numpy.ndarray"
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise _refuse(self.path, module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise _refuse(self.path, "persistent", str(pid))

    def last_name(self) -> str:
        """The name that was read last."""
        values = [value for level in (*self.metastack, self.stack) for value in level]
        return next((value for value in reversed(values) if isinstance(value, str)), "?")

    def _large(self, length: int) -> bool:
        """Whether bytes of this length stand outside of a frame, as they are."""
        if length < _LARGE or self._unframer.current_frame is not None:
            return False
        start = self.source.tell()
        if start + length > self.size:
            raise UserError(
                f"{self.path}, tensor {self.last_name()}: the file is cut off in this tensor; copy or download it again"
            )
        self.source.seek(start + length)
        self.append(_Bytes(start, length))
        return True

    def load_binbytes(self) -> None:
        (length,) = struct.unpack("<I", self.read(4))
        if not self._large(length):
            self.append(self.read(length))

    def load_binbytes8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        if not self._large(length):
            self.append(self.read(length))

    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
