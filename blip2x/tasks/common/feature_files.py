"""A folder of features: numbered shards, each written whole or not at all, and a manifest that says what they hold.

N rows of a shard; arrays are [N, ...].
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from blip2x.config.tools import FeatureFormat
from blip2x.errors import UserError

MANIFEST = "manifest.json"
_PROGRESS = ("complete", "rows")  # what of a manifest is no description
_SUFFIX = {FeatureFormat.safetensors: "safetensors", FeatureFormat.parquet: "parquet"}
_COLUMNS = {"image_id": pa.int64(), "name": pa.string(), "text": pa.string()}


class FeatureFiles:
    """Shards of features and of what each row is of.

    With safetensors 00007.safetensors has the arrays, and line n of 00007.jsonl says what row n is of; with Parquet
    00007.parquet has both, arrays as lists of fixed size.

    Args:
        folder: made where it is not there.
        format: of the shards.
        arrays: name -> shape of a row.
        dtype: "float32" or "float16".
        texts: whether rows are of texts, so that all shards have a column for them, also one without rows.
    """

    def __init__(self, folder: Path, format: FeatureFormat, arrays: dict[str, tuple[int, ...]], dtype: str, *, texts: bool):
        self._folder, self._format, self._arrays, self._dtype = folder, format, arrays, np.dtype(dtype)
        self._columns = {name: kind for name, kind in _COLUMNS.items() if texts or name != "text"}

    def begin(self, description: dict[str, Any]) -> None:
        """Write the manifest, or go on with shards that another process left.

        Raises:
            UserError: those hold something else than `description` says.
        """
        before = self._folder / MANIFEST
        if before.is_file():
            known = {
                key: value for key, value in json.loads(before.read_text(encoding="utf-8")).items() if key not in _PROGRESS
            }
            described = json.loads(json.dumps(description))
            other = [key for key in {**known, **described} if known.get(key) != described.get(key)]
            if other:
                said = "; ".join(f"{key} was {_short(known.get(key))}, is {_short(described.get(key))}" for key in other)
                raise UserError(f"{self._folder} holds features of something else ({said}); choose another run_name")
            return
        self._write_manifest({**description, "complete": False, "rows": None})

    def finish(self, description: dict[str, Any], rows: int) -> None:
        """Say that all shards are there, with so many rows together."""
        self._write_manifest({**description, "complete": True, "rows": rows})

    def rows(self, shard: int) -> int | None:
        """How many rows a shard has; None: it is not there."""
        path = self._path(shard)
        if not path.is_file():
            return None
        if self._format is FeatureFormat.parquet:
            return pq.read_metadata(path).num_rows
        with safe_open(path, "numpy") as file:
            return file.get_slice(next(iter(self._arrays))).get_shape()[0]

    def write(self, shard: int, items: list[dict[str, Any]], batches: list[dict[str, np.ndarray]]) -> None:
        """Write a shard.

        Args:
            shard: its number.
            items: image_id, name and, with `texts`, text of each row.
            batches: the arrays, in the order of `items`; without any, the shard has no rows.
        """
        arrays = {
            name: np.concatenate([np.zeros((0, *shape), self._dtype), *(batch[name].astype(self._dtype) for batch in batches)])
            for name, shape in self._arrays.items()
        }
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._format is FeatureFormat.parquet:
            columns = {name: pa.array([item[name] for item in items], kind) for name, kind in self._columns.items()}
            table = pa.table({**columns, **{name: _lists(array) for name, array in arrays.items()}})
            _write_whole(path, lambda partial: pq.write_table(table, partial, use_dictionary=False))
            return
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        _write_whole(path.with_suffix(".jsonl"), lambda partial: partial.write_text(lines, encoding="utf-8"))
        _write_whole(path, lambda partial: save_file(arrays, partial))  # last: where it is, the shard is whole

    def _path(self, shard: int) -> Path:
        return self._folder / f"{shard:05d}.{_SUFFIX[self._format]}"

    def _write_manifest(self, content: dict[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        _write_whole(self._folder / MANIFEST, lambda partial: partial.write_text(text, encoding="utf-8"))


def _lists(array: np.ndarray) -> pa.Array:
    """[N, A, B, ...] as a column of lists of lists, of fixed sizes."""
    column = pa.array(array.ravel())
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Whoever looks sees the whole file or none, also after a crash of the machine."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]} ..."
