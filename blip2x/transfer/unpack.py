"""Archives of others, taken out safely: what is in them can neither leave its folder nor fill the disk.

Members are written into a hidden folder beside their place, ``.name.zip.unpacking``, and moved when all of them are there and
counted. So what has its proper name is whole.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import IO

from blip2x.errors import UserError
from blip2x.transfer.files import read_json, write_json
from blip2x.transfer.progress import byte_count

MAX_RATIO = 100  # bytes that one byte of an archive may become; JSON shrinks to a tenth, pictures hardly
MIN_LIMIT = 2**20  # of bytes: tiny archives may grow more
MAX_MEMBERS = 10_000_000
MAX_NAME = 1024  # characters of a member's path
_CHUNK = 2**20
_WHOLE = ".whole.json"
_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# all that the readers raise on damaged bytes, UnicodeDecodeError among the ValueErrors
_BROKEN = (
    gzip.BadGzipFile,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
)
_NOT_COUNTED = {"Thumbs.db", "desktop.ini"}  # which file managers leave behind, as they do hidden files


@dataclass(frozen=True)
class Size:
    """What a file or folder holds."""

    files: int
    bytes: int

    def __add__(self, other: Size) -> Size:
        return Size(self.files + other.files, self.bytes + other.bytes)


@dataclass(frozen=True)
class _Member:
    name: str
    is_folder: bool
    open: Callable[[], IO[bytes] | None]


def unpack(
    archive: Path,
    folder: Path,
    gives: Sequence[str],
    *,
    members: int | None = None,
    at: Callable[[int], None] = lambda written: None,
) -> Size:
    """Take `gives` out of a zip, tar, tar.gz, tar.bz2 or tar.xz file.

    Args:
        archive: told by its content, not by its name.
        folder: what `gives` names come into it.
        gives: files and folders at the archive's top, or paths inside it; its other members are left where they are.
        members: how many files that makes; None: not known.
        at: called now and then with the bytes written so far; an exception of its own ends the work.

    Returns:
        What `gives` hold. Where one of them is in its place already, and not empty, that one stays.

    Raises:
        UserError: the archive is broken, lacks one of `gives`, has another number of files, or has a member that would go
            elsewhere, is no plain file, comes twice or makes too much; nothing of it is in its place then. Or the disk is full.
    """
    staging = folder / f".{archive.name}.unpacking"
    state = archive.stat()
    version = [state.st_size, state.st_mtime_ns]
    whole = read_json(staging / _WHOLE)
    try:
        if not whole or whole.get("version") != version:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            try:
                _extract(archive, staging, gives, at)
                found = {name: measure(staging / name) for name in gives}
                _check(archive, found, members)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            write_json(staging / _WHOLE, {"version": version})
        for name in gives:
            source, target = staging / name, folder / name
            if source.exists() and not measure(target).bytes:
                _remove_hollow(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
        shutil.rmtree(staging)
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked into {folder}: {error.strerror or error}") from error
    return reduce(add, (measure(folder / name) for name in gives))


def _remove_hollow(target: Path) -> None:
    """Make room where an interrupted unpacking has left folders and empty files; what holds anything else stays.

    Raises:
        UserError: something else is there.
    """
    if not target.is_dir():
        return
    for here, folders, files in os.walk(target):
        for name in (*folders, *files):
            entry = Path(here, name)
            if entry.is_symlink() or (entry.is_file() and entry.stat().st_size and name not in {*_NOT_COUNTED, ".DS_Store"}):
                raise UserError(f"{target} has none of the files that belong there, but {entry}; move that away")
    shutil.rmtree(target)


def measure(path: Path) -> Size:
    """Files and bytes of a file or folder; nothing where there is none.

    Links to files count as what they lead to; links to folders inside, hidden files and what file managers write do not count.
    """
    if path.is_file():
        return Size(1, path.stat().st_size)
    found = Size(0, 0)
    folders = [path] if path.is_dir() else []
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _NOT_COUNTED:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file():
                    found += Size(1, entry.stat().st_size)
    return found


def _extract(archive: Path, staging: Path, gives: Sequence[str], at: Callable[[int], None]) -> None:
    limit = max(MIN_LIMIT, MAX_RATIO * archive.stat().st_size)
    names = _Names(archive)
    written = 0
    try:
        for count, member in enumerate(_members(archive, limit)):
            if count >= MAX_MEMBERS:
                raise UserError(f"{archive} has more than {MAX_MEMBERS:,} members; it is not unpacked")
            path = names.add(member.name, member.is_folder)
            if member.is_folder or not any(path == name or path.startswith(f"{name}/") for name in gives):
                continue
            target = staging / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, target.open("xb") as file:
                while block := source.read(_CHUNK):
                    written += len(block)
                    _require_honest(archive, written, limit)
                    file.write(block)
                    at(written)
    except UserError:  # a ValueError, too
        raise
    except _BROKEN as error:
        raise UserError(f"{archive} is broken, or no archive ({error}); remove it to fetch it anew") from error


def _check(archive: Path, found: dict[str, Size], members: int | None) -> None:
    lacks = [name for name, content in found.items() if not content.files]
    if lacks:
        raise UserError(f"{archive} has no {', '.join(lacks)}; is it the right file?")
    files = sum(content.files for content in found.values())
    if members is not None and files != members:
        raise UserError(f"{archive} holds {files:,} files, but {members:,} were expected; remove it to fetch it anew")


class _Header(tarfile.TarInfo):
    """Whose end is a block of zeros: tarfile itself takes a damaged header for the end, and the rest would be lost unseen."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}, where a member or the end should be") from error


class _Limited:
    """A stream that is given up where it becomes too long."""

    def __init__(self, stream: IO[bytes], archive: Path, limit: int):
        self._stream, self._archive, self._limit, self._count = stream, archive, limit, 0

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self._count += len(block)
        _require_honest(self._archive, self._count, self._limit)
        return block


def _require_honest(archive: Path, count: int, limit: int) -> None:
    """Bytes are counted as they come, for what headers say may be wrong."""
    if count > limit:
        raise UserError(
            f"{archive} becomes more than {byte_count(limit)}, {MAX_RATIO} times its size, which is no honest archive; it is "
            "not unpacked"
        )


def _decompressed(archive: Path) -> IO[bytes]:
    with archive.open("rb") as file:
        start = file.read(6)
    for magic, opener in _COMPRESSIONS.items():
        if start.startswith(magic):
            return opener(archive, "rb")
    return archive.open("rb")


def _members(archive: Path, limit: int) -> Iterator[_Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                _require_plain(archive, info.filename, info.external_attr >> 16, info.is_dir())
                if info.flag_bits & 1:
                    raise UserError(f"{archive}: {info.filename} is encrypted; it is not unpacked")
                yield _Member(info.filename, info.is_dir(), lambda info=info: file.open(info))
        return
    # in one pass, which is quick for large ones
    with (
        _decompressed(archive) as stream,
        tarfile.open(fileobj=_Limited(stream, archive, limit), mode="r|", tarinfo=_Header) as file,
    ):
        for info in file:
            plain = (info.isreg() or info.isdir()) and not info.issparse()
            _require_plain(archive, info.name, info.mode & 0o7777 | (0 if plain else stat.S_IFLNK), info.isdir())
            yield _Member(info.name, info.isdir(), lambda info=info: file.extractfile(info))
            file.members = []  # they would be kept, all of them
        while file.fileobj.read(_CHUNK):  # to the end, where the decompressor sees whether all was there
            pass


def _require_plain(archive: Path, name: str, mode: int, is_folder: bool) -> None:
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{archive}: {name!r} is a link or a device, no plain file; the archive is not unpacked")
    if not is_folder and mode & (stat.S_ISUID | stat.S_ISGID):  # a folder's only says which group its files get
        raise UserError(f"{archive}: {name!r} would run with another user's rights (setuid); the archive is not unpacked")


class _Names:
    """The paths of an archive, none of which leaves its folder or meets another, whatever the file system."""

    def __init__(self, archive: Path):
        self._archive = archive
        self._spelled: dict[str, str] = {}  # by what a file system may take for the same
        self._files: set[str] = set()

    def add(self, name: str, is_folder: bool) -> str:
        """`name` without what is superfluous in it."""
        if len(name) > MAX_NAME:
            raise UserError(
                f"{self._archive}: a member's name has {len(name):,} characters, more than {MAX_NAME:,}: {name[:60]!r}…; the "
                "archive is not unpacked"
            )
        parts = [part for part in name.split("/") if part not in ("", ".")]
        odd = name.startswith("/") or "\\" in name or ".." in parts or re.match("[A-Za-z]:", name)
        if odd or any(ord(character) < 32 or ord(character) == 127 for character in name):
            raise UserError(f"{self._archive}: {name!r} would go elsewhere; the archive is not unpacked")
        for end in range(1, len(parts) + 1):
            path = "/".join(parts[:end])
            same = unicodedata.normalize("NFKC", path).casefold()
            is_file = end == len(parts) and not is_folder
            is_taken = same in self._files or (is_file and same in self._spelled)
            if (spelled := self._spelled.setdefault(same, path)) != path or is_taken:
                raise UserError(
                    f"{self._archive}: {name!r} and {spelled!r} are one file on some systems; the archive is not unpacked"
                )
            if is_file:
                self._files.add(same)
        return "/".join(parts)
