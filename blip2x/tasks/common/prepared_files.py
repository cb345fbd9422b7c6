"""One file of a data set: whether it is there, how it gets there, and whether it is what it should be."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
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
_STARTS = {".json": rb"[\[{]", ".jsonl": rb"\{", ".tsv": rb"[^<]"}  # of text files


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
        if file.unpack is not None:
            return self._found_members(file)
        if not path.is_file():
            return None
        size = path.stat().st_size
        entry = self._known(file)
        if size != entry.get("size"):
            try:
                self._fetch_file(file, None)  # which fetches nothing, as there is a file, but looks whether it is the right one
            except UserError as error:
                return State("wrong", size, str(error))
            self._remember_file(file)
        return State("there", size)

    def _found_members(self, file: RemoteFile) -> State | None:
        entry = self._known(file)
        if _is_as_it_was(file, entry):
            return State("there", entry["bytes"])
        size, lacking = _measure(file)
        if lacking:
            return None
        if trouble := _difference(file, size, entry):
            return State("wrong", size.bytes, f"{trouble}; remove it to fetch it anew")
        self._remember_members(file, size)
        return State("there", size.bytes)

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
            self._remember_file(file)
            return State("fetched", path.stat().st_size)
        with TransferProgress(path.name, None, board) as progress:
            progress.unpack(path.stat().st_size)
            inner = Path(file.unpack)
            size = unpack(path, inner, file.gives, members=file.members, at=lambda written: progress.at(written, None))
        self._remember_file(file)
        self._remember_members(file, size, unpacked=True)
        self.tidy(file)
        return State("fetched", size.bytes)

    def tidy(self, file: RemoteFile) -> None:
        """Unless archives are kept, remove that of what is there and whole; an earlier run may have left it."""
        path = Path(file.path)
        entry = self._known(file)
        is_whole = entry.get("unpacked") or file.members is not None
        if self.keep_archives or file.unpack is None or not is_whole or not _is_as_it_was(file, entry):
            return
        with suppress(OSError):  # a folder that cannot be written is used as it is
            path.unlink(missing_ok=True)
            beside(path, "origin.json").unlink(missing_ok=True)

    def verify(self, file: RemoteFile, hint: str) -> State:
        """Compute checksums and count members anew; `hint` says how to get what is not there."""
        path = Path(file.path)
        checksums = _checksums(file, self.known.get(path))
        if path.is_file():
            size = path.stat().st_size
            if file.size not in (None, size):
                return State("wrong", size, f"{path} has {size:,} bytes, but {file.size:,} were expected; remove it; {hint}")
            found = digest(path, checksums) if checksums else {}
            for name, checksum in checksums.items():
                if found[name] != checksum.lower():
                    return State("wrong", size, f"{path} has the {name} {found[name]}, not {checksum}; remove it; {hint}")
            if file.unpack is None:
                return State("verified" if checksums else "there", size)
        elif file.unpack is None:
            return State("missing", file.size, f"there is no {path}; {hint}")
        (size, lacking), entry = _measure(file), self._known(file)
        if lacking:
            return State("missing", file.size, f"there is no {', '.join(lacking)}, or nothing in it; {hint}")
        if trouble := _difference(file, size, entry):
            return State("wrong", size.bytes, f"{trouble}; remove it; {hint}")
        return State("verified" if entry.get("unpacked") or file.members is not None else "there", size.bytes)

    def _fetch_file(self, file: RemoteFile, board: Board | None) -> None:
        path = Path(file.path)
        had_it = path.is_file()
        checksums = _checksums(file, self.known.get(path))
        try:
            download(file.url, path, size=file.size, **checksums, board=board)
        except UserError as error:
            if file.sha256 or file.md5 or not checksums or checksums["sha256"] not in str(error):
                raise
            raise UserError(
                f"{error}; that was its checksum when it was fetched first: if its owner has changed it since, remove it from "
                f"{self.known.path} as well"
            ) from error
        if not (file.sha256 or file.md5):
            try:
                _require_text(path)
            except UserError as error:
                if had_it:
                    raise UserError(f"{error}; remove it to fetch it anew") from None
                path.unlink()
                beside(path, "origin.json").unlink(missing_ok=True)
                raise UserError(f"{error}, and was removed; fetch {file.url} yourself, and put it there") from None

    def _known(self, file: RemoteFile) -> dict[str, Any]:
        """What an earlier run has found out about what is wanted now; {}: nothing."""
        entry = self.known.get(Path(file.path))
        return entry if entry.get("wanted") == self._wanted(file) else {}

    def _remember_file(self, file: RemoteFile) -> None:
        """Its checksum, which later ones are compared with; so only when it has turned out to be what it should be."""
        path = Path(file.path)
        sha256 = (read_origin(path) or {}).get("sha256") or digest(path, ["sha256"])["sha256"]
        self.known.put(path, {"wanted": self._wanted(file), "size": path.stat().st_size, "sha256": sha256})

    def _remember_members(self, file: RemoteFile, size: Size, *, unpacked: bool = False) -> None:
        """`unpacked`: they came out of the archive here, so that later ones have to be as many."""
        path = Path(file.path)
        seen = {name: value for name, value in self.known.get(path).items() if name in ("size", "sha256")}
        was_unpacked = bool(self._known(file).get("unpacked"))
        what = {"wanted": self._wanted(file), "files": size.files, "bytes": size.bytes, "places": _marks(file)}
        self.known.put(path, seen | what | {"unpacked": unpacked or was_unpacked})

    def _wanted(self, file: RemoteFile) -> dict[str, Any]:
        wanted = {name: getattr(file, name) for name in ("url", "size", "sha256", "md5", "gives", "members")}
        return wanted | {"unpack": None if file.unpack is None else self.known.key(Path(file.unpack))}


def places(file: RemoteFile) -> list[Path]:
    """Where it ends: the file itself, or what comes out of it."""
    return [Path(file.path)] if file.unpack is None else [Path(file.unpack) / name for name in file.gives]


def by_hand_state(thing: ByHand) -> State:
    """Whether what cannot be fetched has been put where it belongs."""
    path = Path(thing.path)
    size = measure(path)
    if not size.bytes:
        return State("missing", None, f"there is no {path}, and it cannot be fetched for you: {thing.how}")
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


def _measure(file: RemoteFile) -> tuple[Size, list[str]]:
    """What its places hold, and those that are not there or hold nothing: empty folders and empty files are no data set."""
    sizes = {str(place): measure(place) for place in places(file)}
    return reduce(add, sizes.values()), [place for place, size in sizes.items() if not size.bytes]


def _marks(file: RemoteFile) -> list[list[int]]:
    """What changes when a place is removed and made anew, or files are put into it or taken out."""
    states = [place.stat() for place in places(file)]
    return [[state.st_ino, state.st_mtime_ns] for state in states]


def _is_as_it_was(file: RemoteFile, entry: Mapping[str, Any]) -> bool:
    """Whether what was counted is there still, as far as can be told without counting anew."""
    try:
        return bool(entry.get("files")) and entry.get("places") == _marks(file)
    except OSError:
        return False


def _difference(file: RemoteFile, size: Size, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with the members that are there; what was only found there, and not unpacked, is no measure."""
    where = ", ".join(map(str, places(file)))
    unpacked = entry if entry.get("unpacked") else {}
    expected = file.members if file.members is not None else unpacked.get("files")
    if expected not in (None, size.files):
        return f"{where} has {size.files:,} files, but {expected:,} were expected"
    if unpacked.get("bytes") not in (None, size.bytes):
        return f"{where} has {size.bytes:,} bytes, not the {unpacked['bytes']:,} that were unpacked"
    return None


def _require_text(path: Path) -> None:
    """Raise `UserError` where a text file begins as none of its kind does: some servers answer with a page to log in."""
    if (suffix := path.suffix.lower()) in _STARTS:
        with path.open("rb") as file:
            start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        if not re.match(_STARTS[suffix], start):
            raise UserError(f"{path} is no {suffix[1:].upper()} file: it begins with {start[:40]!r}")
