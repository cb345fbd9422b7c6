"""Annotations as tables on disk, memory-mapped: what was read once opens at once, and all processes share its memory.

A table is an Arrow file in the folder of the config's `annotation_cache`. Its name follows from the annotation files, their
sizes and times, so that a changed file is read anew.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from blip2x.data.rows import CaptionRow, Format, QuestionRow
from blip2x.data.tokenize import clean_caption
from blip2x.errors import UserError
from blip2x.transfer.files import locked

_VERSION = 1  # of what tables hold: another one makes them anew
_ROWS = 100_000  # turned into columns at a time

_STORED = {"file": pa.large_string(), "offset": pa.int64(), "length": pa.int64()}
CAPTIONS = pa.schema(
    {
        "image": pa.large_string(),
        "captions": pa.large_list(pa.large_string()),
        "image_id": pa.int64(),
        "group": pa.large_string(),
    }
    | _STORED
)
QUESTIONS = pa.schema(
    {
        "image": pa.large_string(),
        "question": pa.large_string(),
        "answers": pa.large_list(pa.large_string()),
        "question_id": pa.int64(),
        "question_type": pa.large_string(),
        "answer_type": pa.large_string(),
        "image_id": pa.int64(),
        "group": pa.large_string(),
    }
)


@dataclass(frozen=True)
class TableFile:
    """A table in memory-mapped `path`."""

    path: Path
    table: pa.Table
    memory: mmap.mmap

    def release(self) -> None:
        """Give back the pages that were looked at; they stay in the system's cache, where they belong to no process."""
        self.memory.madvise(mmap.MADV_DONTNEED)


def caption_table(reader: Format, cache: Path, say: Callable[[str], None]) -> TableFile:
    """One row per image, in the order in which images first occur.

    Image numbers are those of the file where each image has one of its own, else images are counted from 0.

    Raises:
        UserError: the annotation files are not there or not what they should be, or the cache cannot be written.
    """
    return _open(reader, "captions", cache, lambda: _caption_columns(reader.captions(), say))


def question_table(reader: Format, cache: Path, say: Callable[[str], None]) -> TableFile:
    """One row per question; ``question_id`` is the file's where all have one, else they are counted.

    Errors as `caption_table`, and where a number is given to two questions.
    """
    return _open(reader, "questions", cache, lambda: _question_columns(reader.questions(), say))


def _open(reader: Format, sort: str, cache: Path, make: Callable[[], pa.Table]) -> TableFile:
    path = cache / f"{_key(reader, sort)}.arrow"
    found = _mapped(path)
    try:
        if found is None:
            cache.mkdir(parents=True, exist_ok=True)
            with locked(path):
                found = _mapped(path)  # another process may have made it meanwhile
                if found is None:
                    made = _made(make)
                    write_whole(path, lambda file: _write_table(made, file))
                    found = _mapped(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}; set paths.cache to another folder") from error
    return found


def _mapped(path: Path) -> TableFile | None:
    """The table in a file; None where there is none, or a part of one, as a power failure can leave."""
    try:
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(memory))).read_all()
    except (FileNotFoundError, NotADirectoryError, ValueError, pa.ArrowInvalid):  # ValueError: of an empty file
        return None
    return TableFile(path, table, memory)


def _made(make: Callable[[], pa.Table]) -> pa.Table:
    try:
        return make()
    except OSError as error:  # of what is read, not of the cache
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}") from error


def _key(reader: Format, sort: str) -> str:
    """Of everything that a table depends on."""
    files = []
    for path in reader.files():
        try:
            found = path.stat()
        except OSError as error:
            raise UserError(f"annotation file {path} does not exist") from error
        files.append([os.path.abspath(path), found.st_size, found.st_mtime_ns])
    what = [_VERSION, sort, type(reader).__name__, sorted(map(str, vars(reader).values())), files]
    name = Path(files[0][0]).stem if files else sort
    return f"{name[:60]}-{sort}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"


def _write_table(table: pa.Table, file: IO[bytes]) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())  # one chunk per column, so that a row is found without a search


def write_whole(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """By way of a draft, so that nobody reads half a file."""
    draft = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        with draft.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _caption_columns(rows: Iterator[CaptionRow], say: Callable[[str], None]) -> pa.Table:
    blocks, unusable, with_captions, without = [], "", False, ""
    for block in _blocks(rows, "captions", say):
        columns: dict[str, list[Any]] = {name: [] for name in CAPTIONS.names}
        for row in block:
            if row.captions:
                with_captions = True
            else:
                without = without or row.where
            if not unusable and row.captions and not any(map(clean_caption, row.captions)):
                unusable = f"{row.where}: 'caption' is empty but for punctuation: {list(row.captions)}"
            file, offset, length = row.stored or (None, None, None)
            values = (row.image, row.captions, row.number, row.group, file, offset, length)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        blocks.append(pa.table(columns, schema=CAPTIONS))
    if not blocks:
        raise UserError("no image with a caption was found in the annotation files")
    if with_captions and without:
        raise UserError(f"{without} has no caption, though others have; add one or remove the entry")
    table = _by_image(pa.concat_tables(blocks).combine_chunks())
    return table.replace_schema_metadata({"unusable": unusable})


def _by_image(table: pa.Table) -> pa.Table:
    """One row per image: with the captions of all its rows, and what else the first one says."""
    encoded = table["image"].combine_chunks().dictionary_encode()
    image_R = encoded.indices.to_numpy()
    if len(encoded.dictionary) < len(image_R):
        order_R = np.argsort(image_R, kind="stable")
        first_N = order_R[np.searchsorted(image_R[order_R], np.arange(len(encoded.dictionary)))]
        sorted_captions = table["captions"].take(pa.array(order_R)).combine_chunks()
        ends_R = np.cumsum(np.diff(sorted_captions.offsets.to_numpy()))
        last_N = np.searchsorted(image_R[order_R], np.arange(len(encoded.dictionary)), side="right") - 1
        offsets = np.concatenate([[0], ends_R[last_N]])
        captions = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), sorted_captions.flatten())
        table = table.take(pa.array(first_N)).set_column(1, "captions", captions)
    number = table["image_id"].to_numpy(zero_copy_only=False)
    return table.set_column(2, "image_id", pa.array(_numbers(number), pa.int64()))


def _question_columns(rows: Iterator[QuestionRow], say: Callable[[str], None]) -> pa.Table:
    blocks, answered, unanswered = [], False, ""
    for block in _blocks(rows, "questions", say):
        columns: dict[str, list[Any]] = {name: [] for name in QUESTIONS.names}
        for row in block:
            if row.answers:
                answered = True
            else:
                unanswered = unanswered or row.where
            ids = (row.question_id, row.question_type, row.answer_type, row.number, row.group)
            for column, value in zip(columns.values(), (row.image, row.question, row.answers, *ids), strict=True):
                column.append(value)
        blocks.append(pa.table(columns, schema=QUESTIONS))
    if not blocks:
        raise UserError("no question was found in the annotation files")
    if answered and unanswered:
        raise UserError(f"{unanswered} has no 'answer', though others have; add one or remove the entry")
    table = pa.concat_tables(blocks).combine_chunks()
    encoded = table["image"].combine_chunks().dictionary_encode()
    image_R = encoded.indices.to_numpy()
    _, first_N = np.unique(image_R, return_index=True)
    numbers_N = _numbers(table["image_id"].to_numpy(zero_copy_only=False)[first_N])
    table = table.set_column(6, "image_id", pa.array(numbers_N[image_R], pa.int64()))
    ids = table["question_id"]
    if ids.null_count:
        return table.set_column(3, "question_id", pa.array(np.arange(len(table)), pa.int64()))
    values, counts = np.unique(ids.to_numpy(), return_counts=True)
    if (counts > 1).any():
        raise UserError(f"question_id {values[counts > 1][0]} is given more than once")
    return table


def _numbers(given: np.ndarray) -> np.ndarray:
    """Numbers of images: those given, where each has one of its own; else they are counted."""
    known = given.dtype == np.int64  # with an image that has none, numpy makes them floats
    return given if known and len(np.unique(given)) == len(given) else np.arange(len(given))


def _blocks(rows: Iterator[Any], what: str, say: Callable[[str], None]) -> Iterator[list[Any]]:
    done = 0
    while block := list(islice(rows, _ROWS)):
        yield block
        done += len(block)
        if len(block) == _ROWS:
            say(f"reading {what}: {done:,}")
