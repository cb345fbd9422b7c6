"""Lists of pictures on the web, read piece by piece: they may have millions of lines."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from blip2x.errors import UserError

_PIECE = 2**20  # characters
_MAX_ENTRY = 2**24
_BEFORE_FIRST, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s,]*")


class Link(NamedTuple):
    """One picture."""

    url: str
    caption: str | None
    name: str | None  # of its file; None: not in the list

    @property
    def key(self) -> str:
        """24 hexadecimal digits that are as good as the address."""
        return hashlib.sha1(self.url.encode(), usedforsecurity=False).hexdigest()[:24]


def read_links(path: Path) -> Iterator[Link]:
    """The pictures of a list, in its order.

    Args:
        path: JSON, a list of {"url", "caption"} as BLIP's, or COCO's {"images": [{"coco_url", "file_name"}]}; the same
            objects line by line (.jsonl); or a .tsv file with a caption and an address on each line, in either order.

    Raises:
        UserError: there is no such file, or an entry is not of that form; with its number. An address may be wrong all the
            same: among millions some are.
    """
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            entries = {".tsv": _rows, ".jsonl": _lines}.get(path.suffix.lower(), _objects)(file, path)
            for number, entry in enumerate(entries):
                yield _link(entry, f"{path}, entry {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _link(entry: Any, where: str) -> Link:
    url = entry.get("url", entry.get("coco_url")) if isinstance(entry, dict) else None
    if not isinstance(url, str):
        raise UserError(f"{where} has no web address as 'url' or 'coco_url': {str(entry)[:200]}")
    caption, name = entry.get("caption"), entry.get("file_name")
    if not isinstance(caption, (str, type(None))):
        raise UserError(f"{where} has a 'caption' that is no text: {str(caption)[:200]}")
    if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]{0,199}", name)):
        raise UserError(f"{where} has the 'file_name' {name!r}, which is no plain name")
    return Link(_sound(url).strip(), caption and _sound(caption), name)


def _sound(text: str) -> str:
    """With a question mark for each half of a character: JSON may hold such, but they cannot be stored or sent."""
    return text.encode("utf-8", "replace").decode()


def _rows(file: TextIO, path: Path) -> Iterator[Any]:
    """The first line tells which column has the addresses: the first or the last."""
    place = None
    for number, line in enumerate(file):
        if not line.strip():
            continue
        columns = line.rstrip("\r\n").split("\t")
        if place is None:
            place = next((at for at in (0, -1) if re.match("https?://", columns[at], re.IGNORECASE)), None)
        if place is None or len(columns) < 2:
            raise UserError(f"{path}, line {number + 1} is not a caption and a web address with a tab between: {line[:200]!r}")
        url = columns.pop(place)
        yield {"url": url, "caption": " ".join(columns)}


def _lines(file: TextIO, path: Path) -> Iterator[Any]:
    for number, line in enumerate(file):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number + 1} is no JSON: {error}") from error


def _objects(file: TextIO, path: Path) -> Iterator[Any]:
    """The elements of a JSON list, of which never more than a piece is in memory; COCO's format is read as a whole."""
    buffer = ""
    while not buffer and (more := file.read(_PIECE)):
        buffer = more.lstrip("\ufeff \t\r\n")
    if buffer.startswith("{"):
        try:
            images = json.loads(buffer + file.read()).get("images")
        except ValueError as error:
            raise UserError(f"{path} is no JSON: {error}") from error
        if not isinstance(images, list):
            raise UserError(f"{path} has no list of 'images'")
        yield from images
        return
    if not buffer.startswith("["):
        raise UserError(f"{path} is neither a JSON list nor COCO's format; it begins with {buffer[:40]!r}")
    decoder, place, first = json.JSONDecoder(), 1, True
    while True:
        gap = (_BEFORE_FIRST if first else _BETWEEN).match(buffer, place).end()
        if buffer[gap : gap + 1] == "]":
            return
        try:
            entry, end = decoder.raw_decode(buffer, gap)
        except ValueError as error:
            more = file.read(_PIECE)
            if not more or len(buffer) - place > _MAX_ENTRY:
                raise UserError(f"{path} is broken, or was cut off: {error}") from error
            buffer, place = buffer[place:] + more, 0
            continue
        yield entry
        place, first = end, False
        if place > _PIECE // 2 and len(buffer) - place < _PIECE // 2:
            buffer, place = buffer[place:] + file.read(_PIECE), 0
