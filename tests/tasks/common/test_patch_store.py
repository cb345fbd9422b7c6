"""Patches come back as they went in, from memory as from a file that leaves nothing behind."""

from __future__ import annotations

import errno
import os

import numpy as np
import paddle
import pytest

from blip2x.errors import UserError
from blip2x.tasks.common.patch_store import PatchStore

SIZE = 3 * 4 * 5 * 4  # bytes of three images in float32


@pytest.mark.parametrize(("memory", "on_disk"), [(SIZE, False), (SIZE - 1, True)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_patches_come_back_by_place(tmp_path, memory, on_disk, dtype):
    store = PatchStore(tmp_path / "new", 3, memory_bytes=memory if dtype == "float32" else memory / 2, dtype=dtype)
    patches = paddle.to_tensor(np.random.default_rng(0).random((3, 4, 5), dtype=np.float32))
    store.add([7, 4], patches[:2])
    store.add([1], patches[2:])
    assert store.places == [7, 4, 1] and store.is_on_disk is on_disk
    expected = patches.numpy().astype(dtype).astype("float32")
    for row, place in enumerate(store.places):
        assert store.patches([place]).shape == [1, 4, 5] and str(store.patches([place]).dtype) == "paddle.float32"
        np.testing.assert_array_equal(store.patches([place]).numpy()[0], expected[row])
    np.testing.assert_array_equal(store.patches([1, 7]).numpy(), expected[[2, 0]])
    assert not (tmp_path / "new").exists() or not os.listdir(tmp_path / "new")


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    store = PatchStore(tmp_path, 10**6, memory_bytes=0, dtype="float32")
    with pytest.raises(UserError, match=r"no room for 5\.6 GB of patches in .*No space left.*task\.patch_dtype=float16"):
        store.add([0], paddle.zeros([1, 1, 1408]))
