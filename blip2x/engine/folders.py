"""Run folders: made by exactly one process, never mixed with an older run's files."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from blip2x.errors import UserError

MIN_FREE_BYTES = 200 * 2**20  # a demo run's checkpoints and report, several times over
RUN_FILES = ("config.yaml", "command.txt", "versions.json")  # a folder with all of these is a run of ours

_held: dict[Path, tuple[int, TextIO]] = {}  # by run folder: the process that works in it, and its open lock file


class _Taken(UserError):
    """Another run has the folder."""


def require_space(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise `UserError` unless the disk of `folder` (which need not exist yet) has `needed` bytes free."""
    free = shutil.disk_usage(existing_folder(folder)).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB free on its disk, {needed / 2**20:.0f} MiB are needed; "
            "make room or set paths.outputs to another disk"
        )


def existing_folder(path: Path) -> Path:
    """`path` where it is there, else the nearest folder above it that is: both on the same disk."""
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def same_disk(one: Path, other: Path) -> bool:
    """Whether what is written into two folders, which need not be there yet, takes the same room."""
    return existing_folder(one).stat().st_dev == existing_folder(other).stat().st_dev


def bytes_below(folder: Path) -> int:
    """What the files in a folder take; others may delete it meanwhile."""
    count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                count += os.path.getsize(os.path.join(parent, name))
    return count


def write_whole(path: Path, text: str) -> None:
    """Write a file; whoever reads it sees the old content or the new, never half."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def append_whole(path: Path, text: str) -> None:
    """Append to a file, which is opened each time, so that a crash loses nothing; all of `text` or, on an error, nothing."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        content = text.encode()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def hold(folder: Path) -> bool:
    """Keep other processes from working in the run `folder`, which need not exist, until `release` or this process's end.

    False: this process did so already. The lock is on a file beside the folder; a file system without locks keeps nobody away.

    Raises:
        UserError: another process holds it, or there cannot be a run folder of that name here.
    """
    folder = folder.absolute()
    if folder in _held and _held[folder][0] == os.getpid():
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(folder)
    except OSError as error:
        raise _cannot(folder, error) from error
    if file is None:
        holder = ""
        with suppress(OSError):
            holder = _lock_file(folder).read_text(encoding="utf-8").strip()
        raise _Taken(
            f"{folder}: {holder or 'another process'} is working on this run; wait for its end, or choose another run_name"
        )
    _held[folder] = (os.getpid(), file)
    return True


def release(folder: Path) -> None:
    """Let others work in `folder`, which this process may hold."""
    holder, file = _held.pop(folder.absolute(), (0, None))
    if file is not None and holder == os.getpid():  # a fork has the entry and not the lock
        with suppress(OSError):
            _lock_file(folder).unlink()
        file.close()


def is_held(folder: Path) -> bool:
    """Whether a process works in the run `folder` now."""
    folder = folder.absolute()
    if folder in _held and _held[folder][0] == os.getpid():
        return True  # to open and close the file once more would give the lock up
    if not _lock_file(folder).is_file():
        return False
    try:
        with _lock_file(folder).open("r+", encoding="utf-8") as file:
            return not _try(file)
    except OSError:
        return False


def _lock_file(folder: Path) -> Path:
    return folder.absolute().with_name(f".{folder.name}.lock")


def _lock(folder: Path) -> TextIO | None:
    """The open lock file; None: somebody else has it."""
    path = _lock_file(folder)
    while True:
        file = path.open("a+", encoding="utf-8")
        if not _try(file):
            file.close()
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
        file.close()  # its last holder removed it after it had been opened here


def _try(file: TextIO) -> bool:
    try:
        # not flock: worker processes would inherit that one, and hold it when this process has been killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def claim_folder(parent: Path, name: str | None, *, auto_name: str, overwrite: bool) -> Path:
    """Make the folder `name` in `parent` and `hold` it; where it is None, `auto_name` with a number if that is taken.

    Raises:
        UserError: it exists and `overwrite` is false, is not a run's, or another process works in it; `name` is no plain name;
            it cannot be made.
    """
    if name is not None:
        check_name(name)
        return _claim(parent / name, overwrite)
    for number in itertools.count(1):
        folder = parent / (auto_name if number == 1 else f"{auto_name}-{number}")
        try:
            return _claim(folder, overwrite=False)
        except _Taken:  # by another run, started in the same second
            continue
    raise AssertionError("unreachable: itertools.count never ends")


def check_name(name: str) -> None:
    """Raise `UserError` where a run cannot be called that."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"run_name={name!r} must be a plain folder name, without slashes; choose the place with paths.outputs")


def _claim(folder: Path, overwrite: bool) -> Path:
    is_new = hold(folder)
    try:
        _make(folder, overwrite)
        return folder
    except BaseException as error:
        if is_new:
            release(folder)
        if isinstance(error, OSError):
            raise _cannot(folder, error) from error
        raise


def _cannot(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot make a run folder in {folder.parent}: {error.strerror or error}; "
        "set paths.outputs to a folder that can be written"
    )


def _make(folder: Path, overwrite: bool) -> None:
    try:
        folder.mkdir()
        return
    except FileExistsError:
        if not overwrite:
            raise _Taken(
                f"{folder} exists already; choose another run_name, go on with resume=auto, or replace it with overwrite=true"
            ) from None
    absent = [name for name in RUN_FILES if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"overwrite=true, but {folder} has no {absent[0]}, so it is no run of blip2x and is kept; choose another run_name"
        )
    shutil.rmtree(folder)
    folder.mkdir()
