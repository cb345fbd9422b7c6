"""From files, folders, patterns and web addresses to a list of pictures; nothing is opened or fetched."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from blip2x.data.download import is_web_address
from blip2x.data.pictures import FORMATS
from blip2x.errors import UserError

_OTHER_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_HOW_TOLD = "pictures are told by their suffix, as in .jpg or .png"


def list_pictures(inputs: Sequence[str]) -> list[str]:
    """Paths and addresses, each picture once, in the order of `inputs`; those of one folder or pattern are sorted.

    Folders are searched to the bottom, without what is hidden. A file that is named is taken whatever it is called; in folders
    and patterns pictures are told by their suffix.

    Raises:
        UserError: a file or folder does not exist, a folder or pattern has no picture, or a picture's name is not UTF-8.
    """
    found: dict[str, str] = {}  # one name per picture -> the name it was given
    for entry in inputs:
        for name in _pictures(entry):
            _require_utf8(name)  # what is written of a picture names it
            found.setdefault(name if is_web_address(name) else os.path.realpath(name), name)
    return list(found.values())


def _require_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode(errors="backslashreplace")
        raise UserError(f"task.inputs: {shown} has a name that is not UTF-8; rename it") from None


def _pictures(entry: str) -> list[str]:
    if is_web_address(entry):
        return [entry]
    path = os.path.expanduser(entry)
    if os.path.isfile(path):  # first: a name may have brackets and be no pattern
        return [path]
    if path and os.path.isdir(path):
        return _below(path)
    if glob.has_magic(path):
        return _matches(path)
    if _OTHER_ADDRESS.match(entry):
        raise UserError(f"task.inputs: {entry} cannot be fetched; an address starts with http:// or https://")
    where = "" if os.path.isabs(path) else f" in {Path.cwd()}"
    raise UserError(f"task.inputs: there is no file or folder {entry!r}{where}")


def _below(folder: str) -> list[str]:
    def fail(error: OSError) -> None:
        raise UserError(f"task.inputs: folder {error.filename} cannot be read: {error.strerror}")

    pictures, seen = [], set()
    for here, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures += [os.path.join(here, name) for name in files if not name.startswith(".") and is_picture_name(name)]
    if not pictures:
        raise UserError(f"task.inputs: folder {folder} has no picture in it or below it; {_HOW_TOLD}")
    return sorted(pictures)


def _matches(pattern: str) -> list[str]:
    pictures = sorted(path for path in glob.glob(pattern, recursive=True) if is_picture_name(path) and os.path.isfile(path))
    if not pictures:
        raise UserError(f"task.inputs: {pattern!r} matches no picture; {_HOW_TOLD}, and ** stands for folders at any depth")
    return pictures


def is_picture_name(path: str) -> bool:
    """Whether a file is a picture, by its suffix."""
    return os.path.splitext(path)[1].lower() in _suffixes()


@lru_cache(maxsize=1)
def _suffixes() -> frozenset[str]:
    """Of the formats that are read."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
