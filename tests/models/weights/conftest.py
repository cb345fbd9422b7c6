"""Files as PyTorch writes them, without PyTorch."""

from __future__ import annotations

import io
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

KINDS = {"f4": "Float", "f2": "Half", "f8": "Double", "i8": "Long", "i4": "Int", "i2": "Short", "i1": "Char", "u1": "Byte"}


class Storage:
    """Numbers that tensors look into."""

    def __init__(self, kind: str, array: np.ndarray):
        self.kind, self.array = f"{kind}Storage", array


class View:
    """A tensor: part of a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple, stride: tuple, parameter: bool = False):
        self.words = (storage, offset, size, stride, False, OrderedDict())
        self.parameter = parameter

    def __reduce__(self):
        torch = sys.modules["torch._utils"]
        if self.parameter:
            return torch._rebuild_parameter, (View(*self.words[:4]), True, OrderedDict())
        return torch._rebuild_tensor_v2, self.words


class Torch:
    """What of PyTorch the tests need."""

    storage, view = Storage, View

    def tensor(self, array: np.ndarray) -> View:
        """All of a storage of its own."""
        stride = tuple(step // array.itemsize for step in array.strides)
        return View(Storage(KINDS[array.dtype.str[1:]], array), 0, array.shape, stride)

    def save(self, content: Any, path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
        """As torch.save."""
        storages, buffer = [], io.BytesIO()

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if not isinstance(value, Storage):
                    return None
                if value not in storages:
                    storages.append(value)
                kind, number = getattr(sys.modules["torch"], value.kind), str(storages.index(value))
                return ("storage", kind, number, "cpu", value.array.size)

        Pickler(buffer, protocol=2).dump(content)
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("archive/data.pkl", buffer.getvalue())
            for number, storage in enumerate(storages):
                archive.writestr(f"archive/data/{number}", storage.array.tobytes())
        return path


@pytest.fixture
def torch(monkeypatch) -> Torch:
    """`torch.save(content, path)`."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for name in (*KINDS.values(), "BFloat16", "Bool", "QInt8"):
        setattr(torch, f"{name}Storage", type(f"{name}Storage", (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, type(name, (), {"__module__": "torch._utils"}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return Torch()
