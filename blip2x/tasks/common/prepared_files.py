"""One file of a data set: whether it is there, how it gets there, and whether it is what it should be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from blip2x.config.dataset import ByHand, Content, RemoteFile
from blip2x.errors import UserError
from blip2x.transfer.download import download, read_origin
from blip2x.transfer.files import beside, digest, locked
from blip2x.transfer.prepared import Prepared
from blip2x.transfer.progress import Board, TransferProgress, byte_count
from blip2x.transfer.unpack import Size, measure, unpack

_GROWTH = {Content.images: 1, Content.annotations: 10}  # how much larger an archive's members are, about


@dataclass(frozen=True)
class State:
    """What is known about a thing: a row of the table."""

    state: str
    size: int | None = None  # bytes; None: not known
    trouble: str | None = None  # what is wrong and what to do, in a sentence; None: nothing is


class Files:
    """The files that can be fetched, with what earlier runs have found out about them."""

    def __init__(self, known: Prepared, *, keep_archives: bool):
        self.known = known
        self.keep_archives = keep_archives

    def found(self, file: RemoteFile) -> State | None:
        """What is there, without computing anything where an earlier run has; None: it has to be fetched."""
        path = Path(file.path)
        entry = self.known.get(path)
        is_known = entry.get("wanted") == _wanted(file)
        if file.unpack is not None:
            return self._found_members(file, entry if is_known and "files" in entry else None)
        if not path.is_file():
            return None
        size = path.stat().st_size
        if not (is_known and size == entry["size"]):
            try:
                self._fetch_file(file, None)  # which fetches nothing, as there is a file, but looks whether it is the right one
            except UserError as error:
                return State("wrong", size, str(error))
        return State("there", size)

    def _found_members(self, file: RemoteFile, entry: dict[str, Any] | None) -> State | None:
        if not all(path.exists() for path in places(file)):
            return None
        if entry is None:
            size = _measure(places(file))
            if file.members not in (None, size.files):
                return State("wrong", size.bytes, f"{_miscounted(file, size, file.members)}; remove it to fetch it anew")
            entry = self._remember_members(file, size)
        return State("there", entry["bytes"])

    def fetch(self, file: RemoteFile, board: Board) -> State:
        """Fetch and unpack; what an earlier run has begun is gone on with.

        Raises:
            UserError: that is not possible; nothing wrong is in its place.
        """
        path = Path(file.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}, all of it"), board.say):
                return self.found(file) or self._fetch(file, board)  # another process may have been quicker
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

    def _fetch(self, file: RemoteFile, board: Board) -> State:
        path = Path(file.path)
        self._fetch_file(file, board)
        if file.unpack is None:
            return State("fetched", path.stat().st_size)
        with TransferProgress(path.name, None, board) as progress:
            progress.unpack(path.stat().st_size)
            inner = Path(file.unpack)
            size = unpack(path, inner, file.gives, members=file.members, at=lambda written: progress.at(written, None))
        self._remember_members(file, size)
        if not self.keep_archives:
            path.unlink()
            beside(path, "origin.json").unlink(missing_ok=True)
        return State("fetched", size.bytes)

    def verify(self, file: RemoteFile, hint: str) -> State:
        """Compute checksums and count members anew; `hint` says how to get what is not there."""
        path = Path(file.path)
        entry = self.known.get(path)
        checksums = _checksums(file, entry)
        if path.is_file():
            size = path.stat().st_size
            if file.size not in (None, size):
                return State("wrong", size, f"{path} has {size:,} bytes, but {file.size:,} were expected; remove it; {hint}")
            found = digest(path, checksums)
            for name, checksum in checksums.items():
                if found[name] != checksum.lower():
                    return State("wrong", size, f"{path} has the {name} {found[name]}, not {checksum}; remove it; {hint}")
            if file.unpack is None:
                return State("verified" if checksums else "there", size)
        elif file.unpack is None:
            return State("missing", file.size, f"there is no {path}; {hint}")
        lacking = [str(place) for place in places(file) if not place.exists()]
        if lacking:
            return State("missing", file.size, f"there is no {', '.join(lacking)}; {hint}")
        size = _measure(places(file))
        expected = file.members if file.members is not None else entry.get("files")
        if expected not in (None, size.files):
            return State("wrong", size.bytes, f"{_miscounted(file, size, expected)}; remove it; {hint}")
        if entry.get("bytes") not in (None, size.bytes):
            where = ", ".join(map(str, places(file)))
            trouble = f"{where} has {size.bytes:,} bytes, not the {entry['bytes']:,} that were unpacked; remove it; {hint}"
            return State("wrong", size.bytes, trouble)
        return State("there" if expected is None else "verified", size.bytes)

    def _fetch_file(self, file: RemoteFile, board: Board | None) -> None:
        path = Path(file.path)
        entry = self.known.get(path)
        checksums = _checksums(file, entry)
        try:
            download(file.url, path, size=file.size, **checksums, board=board)
        except UserError as error:
            if file.sha256 or file.md5 or not checksums or checksums["sha256"] not in str(error):
                raise
            raise UserError(
                f"{error}; that was its checksum when it was fetched first: if its owner has changed it since, remove it from "
                f"{self.known.path} as well"
            ) from error
        sha256 = (read_origin(path) or {}).get("sha256") or digest(path, ["sha256"])["sha256"]
        self.known.put(path, {"wanted": _wanted(file), "size": path.stat().st_size, "sha256": sha256})

    def _remember_members(self, file: RemoteFile, size: Size) -> dict[str, Any]:
        entry = self.known.get(Path(file.path)) | {"wanted": _wanted(file), "files": size.files, "bytes": size.bytes}
        self.known.put(Path(file.path), entry)
        return entry


def places(file: RemoteFile) -> list[Path]:
    """Where it ends: the file itself, or what comes out of it."""
    return [Path(file.path)] if file.unpack is None else [Path(file.unpack) / name for name in file.gives]


def by_hand_state(thing: ByHand) -> State:
    """Whether what cannot be fetched has been put where it belongs."""
    path = Path(thing.path)
    size = measure(path)
    if not size.files:
        return State("missing", None, f"there is no {path}, and it cannot be fetched for you: {thing.how}")
    if thing.members not in (None, size.files):
        return State("wrong", size.bytes, f"{path} has {size.files:,} files, but {thing.members:,} were expected: {thing.how}")
    return State("there", size.bytes)


def require_space(files: Iterable[RemoteFile], task_parallel: int, keep_archives: bool) -> None:
    """Raise `UserError` unless the disks have room for all `files` and what is unpacked from them, before any is fetched."""
    wanted: dict[int, list[tuple[Path, int, int]]] = {}  # device -> (place, bytes of files, bytes of members)
    for file in files:
        path = Path(file.path)
        existing = next(parent for parent in Path(os.path.abspath(path)).parents if parent.exists())
        partial = beside(path, "partial")
        have = next((each.stat().st_size for each in (path, partial) if each.is_file()), 0)
        size = file.size or 0
        members = 0 if file.unpack is None else size * _GROWTH[file.content]
        wanted.setdefault(existing.stat().st_dev, []).append((existing, max(size - have, 0), members))
    for rows in wanted.values():
        archives = sorted((size for _, size, _ in rows), reverse=True)
        # where they are removed, only those that are worked on are there at a time
        kept = archives if keep_archives else archives[: max(task_parallel, sum(not members for *_, members in rows))]
        needed = sum(kept) + sum(members for *_, members in rows)
        free = shutil.disk_usage(rows[0][0]).free
        if free < needed:
            raise UserError(
                f"{rows[0][0]}: about {byte_count(needed)} are needed for what is to be fetched and unpacked, but its disk has "
                f"{byte_count(free)} free; make room, set paths.data to another disk, leave files out with task.skip, or set "
                "task.keep_archives=false"
            )


def _checksums(file: RemoteFile, entry: dict[str, Any]) -> dict[str, str]:
    """What is published; where nothing is, what was seen when the file came first."""
    published = {name: getattr(file, name) for name in ("sha256", "md5") if getattr(file, name)}
    return published or ({"sha256": entry["sha256"]} if "sha256" in entry else {})


def _wanted(file: RemoteFile) -> dict[str, Any]:
    return {name: getattr(file, name) for name in ("url", "size", "sha256", "md5", "gives", "members")}


def _measure(paths: Iterable[Path]) -> Size:
    return reduce(add, map(measure, paths))


def _miscounted(file: RemoteFile, size: Size, expected: int) -> str:
    return f"{', '.join(map(str, places(file)))} has {size.files:,} files, but {expected:,} were expected"
