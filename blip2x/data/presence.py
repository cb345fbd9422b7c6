"""Which images of a table are there. What was seen is kept beside the table, as long as the folders do not change."""

from __future__ import annotations

import hashlib
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip2x.data.tables import TableFile, write_whole
from blip2x.transfer.files import locked

_ABSENT = -1  # the time of a folder that does not exist
_LOOKED_AT = 1000  # images that a folder's listing lacks and that are looked for by name; more than these are believed missing


def missing_images(found: TableFile, images: Path) -> np.ndarray:
    """Rows of a table whose files are not below `images`, rising.

    One listing per folder: a look at each file is slow over a network. The answer for a folder holds until it changes.
    """
    record = found.path.with_suffix(f".{hashlib.sha256(str(images.resolve()).encode()).hexdigest()[:8]}.images.npz")
    known = _known(record, images)
    if known.complete:
        return known.missing
    try:
        with locked(record):
            known = _known(record, images)  # another process may have looked meanwhile
            return known.missing if known.complete else _look(found.table, record, images, known)
    except OSError:  # the cache can only be read, so that nothing can be kept
        return _look(found.table, None, images, known)


class _Known(NamedTuple):
    """What is known of an image folder: the time of each folder in it at which that holds, and the rows that were missing."""

    times: dict[str, int]
    missing: np.ndarray
    complete: bool  # nothing has changed


def _known(record: Path, images: Path) -> _Known:
    try:
        with np.load(record) as kept:
            times = dict(zip(kept["folders"].tolist(), kept["times"].tolist(), strict=True))
            missing = kept["missing"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return _Known({}, np.array([], dtype=np.int64), False)
    same = {folder: time for folder, time in times.items() if _time(images / folder) == time}
    return _Known(same, missing, len(same) == len(times))


def _look(table: pa.Table, record: Path | None, images: Path, known: _Known) -> np.ndarray:
    """Look into the folders of which nothing is known any more; the record, None: no one's, is written anew."""
    column = (table["file"] if _has_stored(table) else table["image"]).combine_chunks()
    names = pc.replace_substring_regex(column, "^.*/", "")
    encoded = pc.replace_substring_regex(column, "/?[^/]*$", "").dictionary_encode()
    folder_R, folders = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    order_R = np.argsort(folder_R, kind="stable")
    ends = np.searchsorted(folder_R[order_R], np.arange(len(folders) + 1))
    unchanged = np.array([folder in known.times for folder in folders])
    missing, times = [known.missing[unchanged[folder_R[known.missing]]]], dict(known.times)
    for place in np.flatnonzero(~unchanged).tolist():
        folder, rows = images / folders[place], order_R[ends[place] : ends[place + 1]]
        times[folders[place]] = _time(folder)
        own = names.take(pa.array(rows))
        there = pc.is_in(own, value_set=pa.array(_listing(folder), pa.large_string()))
        gone = rows[~there.to_numpy(zero_copy_only=False)]
        if len(gone) <= _LOOKED_AT:  # the disk may call them otherwise, in another case or normal form of Unicode
            gone = np.array([row for row in gone if not os.path.lexists(folder / names[row].as_py())], dtype=np.int64)
        missing.append(gone)
    missing_R = np.sort(np.concatenate(missing))
    if record:
        time_F = np.array(list(times.values()), dtype=np.int64)
        with suppress(OSError):
            write_whole(record, lambda file: np.savez(file, folders=np.array(list(times)), times=time_F, missing=missing_R))
    return missing_R


def _has_stored(table: pa.Table) -> bool:
    return "file" in table.column_names and table["file"].null_count < len(table)


def _time(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return _ABSENT


def _listing(folder: Path) -> list[str]:
    try:
        return [os.fsencode(name).decode("utf-8", "replace") for name in os.listdir(folder)]  # Arrow takes UTF-8 alone
    except OSError:
        return []
