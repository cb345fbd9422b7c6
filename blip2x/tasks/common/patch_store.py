"""Patches of many images, kept until it is known with which texts they are to be matched.

B images of a batch, P patches, D width of the image encoder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

from blip2x.errors import UserError


class PatchStore:
    """Holds patches of this rank's images in memory, or, where they take more than `memory_bytes`, in a file in `folder`.

    The file has no name, so that it is gone when the store or the process is, however that ends.

    Args:
        folder: with room for the patches.
        images: the most that will be added.
        memory_bytes: what they may take in memory.
        dtype: "float32" or "float16", in which they are kept.
    """

    def __init__(self, folder: Path, images: int, *, memory_bytes: float, dtype: str):
        self._folder, self._images, self._memory_bytes, self._dtype = folder, images, memory_bytes, np.dtype(dtype)
        self._rows: dict[int, int] = {}
        self._patch_NPD: np.ndarray | None = None

    @property
    def places(self) -> list[int]:
        """Of the images that were added."""
        return list(self._rows)

    @property
    def is_on_disk(self) -> bool:
        """Whether the patches are in a file."""
        return isinstance(self._patch_NPD, np.memmap)

    def add(self, places: Sequence[int], patch_BPD: Tensor) -> None:
        """Keep the patches of the images at `places`.

        Raises:
            UserError: there is no room for the file.
        """
        if self._patch_NPD is None:
            self._patch_NPD = self._make((self._images, *patch_BPD.shape[1:]))
        first = len(self._rows)
        self._patch_NPD[first : first + len(places)] = patch_BPD.astype("float32").numpy()
        self._rows |= {place: first + row for row, place in enumerate(places)}

    def patches(self, places: Sequence[int]) -> Tensor:
        """Patches [B, P, D] of the images at `places`, in float32."""
        rows = [self._rows[place] for place in places]
        return paddle.to_tensor(self._patch_NPD[rows].astype("float32", copy=False))

    def _make(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * self._dtype.itemsize
        if size <= self._memory_bytes:
            return np.empty(shape, self._dtype)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a full disk is met here, not as a crash in the middle of writing
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, self._dtype, mode="r+", shape=shape)
        except OSError as error:
            raise UserError(
                f"no room for {size / 1e9:.1f} GB of patches in {self._folder} ({error.strerror or error}); make room, set "
                "task.patch_dtype=float16 or paths.outputs to another disk, or raise task.patch_memory_gb"
            ) from error
