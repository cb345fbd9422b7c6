"""Run folders: made by exactly one process, never mixed with an older run's files."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from pathlib import Path

from blip2x.errors import UserError

MIN_FREE_BYTES = 200 * 2**20  # a demo run's checkpoints and report, several times over
RUN_FILES = ("config.yaml", "command.txt", "versions.json")  # a folder with all of these is a run of ours


def require_space(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise `UserError` unless the disk of `folder` (which need not exist yet) has `needed` bytes free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB free on its disk, {needed / 2**20:.0f} MiB are needed; "
            "make room or set paths.outputs to another disk"
        )


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


def claim_folder(parent: Path, name: str | None, *, auto_name: str, overwrite: bool) -> Path:
    """Make the folder `name` in `parent`, or, where it is None, `auto_name` with a number if that is taken.

    Raises:
        UserError: it exists and `overwrite` is false, or is not a run's; `name` is no plain name; it cannot be made.
    """
    if name is not None and (name in ("", ".", "..") or Path(name).name != name):
        raise UserError(f"run_name={name!r} must be a plain folder name, without slashes; choose the place with paths.outputs")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name is not None:
            return _make(parent / name, overwrite)
        for number in itertools.count(1):
            folder = parent / (auto_name if number == 1 else f"{auto_name}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:  # another run of a sweep, started in the same second
                continue
    except OSError as error:
        raise UserError(
            f"cannot make a run folder in {parent}: {error.strerror or error}; "
            "set paths.outputs to a folder that can be written"
        ) from error
    raise AssertionError("unreachable: itertools.count never ends")


def _make(folder: Path, overwrite: bool) -> Path:
    try:
        folder.mkdir()
        return folder
    except FileExistsError:
        if not overwrite:
            raise UserError(
                f"{folder} exists already; choose another run_name, go on with resume=auto, or replace it with overwrite=true"
            ) from None
    absent = [name for name in RUN_FILES if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"overwrite=true, but {folder} has no {absent[0]}, so it is no run of blip2x and is kept; choose another run_name"
        )
    shutil.rmtree(folder)
    folder.mkdir()
    return folder
