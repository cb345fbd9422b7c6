"""What the fetching of files has in common: names beside a file, locks, checksums, and writing whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2x.transfer.progress import Say, say_on_stderr


@contextmanager
def locked(path: Path, say: Say | None = None) -> Iterator[None]:
    """Work on `path` while no other process does; a process that dies gives its lock back.

    Args:
        path: need not exist, its folder must.
        say: gets a line when another process has to be waited for; None: standard error.
    """
    lock = beside(path, "lock")
    waited = False
    while True:
        file = lock.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                (say or say_on_stderr)(f"{path.name}: another process is fetching it; waiting")
            waited = True
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # whoever held it has removed the file: what was locked is no longer what the others look at
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def move(source: Path, target: Path) -> None:
    """Rename within a folder, so that it outlasts a power failure."""
    source.rename(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def digest(path: Path, algorithms: Collection[str]) -> dict[str, str]:
    """Checksums of a file in hexadecimal, by algorithm; it is read once."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in sorted(algorithms, reverse=True)}
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            for each in digests.values():
                each.update(block)
    return {name: each.hexdigest() for name, each in digests.items()}


def beside(path: Path, what: str) -> Path:
    """The hidden file beside `path` that says `what` about it."""
    return path.with_name(f".{path.name}.{what}")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where there is nothing that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: dict[str, Any], *, indent: int | None = None) -> None:
    """Write a file; whoever reads it sees the old content or the new, never half."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(json.dumps(content, indent=indent), encoding="utf-8")
    draft.replace(path)
