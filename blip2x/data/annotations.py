"""Reading annotation files entry by entry.

Lists, lines and tables, which can be long, are never in memory as a whole. Files that are one object are: the official ones of
COCO, VQAv2 and GQA, of some hundred megabytes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from blip2x.errors import UserError

_BOM = b"\xef\xbb\xbf"
_BLANKS = re.compile(r"[ \t\n\r]*")
_CHUNK = 1 << 22  # characters read at a time
_LONGEST_WORD = 16  # what can be cut in two without a quotation mark: a literal, an escape, the digits of a number
_LONGEST_NUMBER = 19  # digits; those of tables have 64 bits
_LONGEST_ENTRY = 1 << 28  # characters; a text whose end is missing is not looked for through gigabytes
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Entry:
    """One object of an annotation file; `where` names it in messages."""

    where: str
    values: dict[str, Any]

    @cached_property
    def image(self) -> str:
        """The image's path relative to the image folder, normalised; it may not lead out of the folder."""
        given = self.get("image")
        if not isinstance(given, str) or not given.strip():
            raise UserError(f"{self.where}: 'image' must be the path of a file below the image folder, got {given!r}")
        return inside(given, self.where)

    def texts(self, key: str) -> tuple[str, ...]:
        """The value of `key`, a text or a list of texts, none of them empty."""
        given = self.get(key)
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{self.where}: {key!r} must be a text or a list of texts, got {_short(given)}")
        if not all(text.strip() for text in texts):
            raise UserError(f"{self.where}: {key!r} is empty; give a text or remove the entry")
        return tuple(sound(text).strip() for text in texts)

    def text(self, key: str) -> str:
        """The value of `key`, one text that is not empty."""
        texts = self.texts(key)
        if len(texts) != 1:
            raise UserError(f"{self.where}: {key!r} must be one text, got {_short(self.values[key])}")
        return texts[0]

    def label(self, key: str, otherwise: str) -> str:
        """The value of `key` in words, whatever it is."""
        return sound(str(self.values.get(key, otherwise)))

    def number(self, key: str) -> int:
        """The value of `key`, an integer."""
        given = self.get(key)
        if not isinstance(given, int) or isinstance(given, bool):
            raise UserError(f"{self.where}: {key!r} must be an integer, got {_short(given)}")
        return digits(given, f"{self.where}: {key!r}")

    def get(self, key: str) -> Any:
        """The value of `key`, whatever it is."""
        if key not in self.values:
            raise UserError(f"{self.where} has no {key!r}; its keys: {', '.join(map(repr, self.values)) or 'none'}")
        return self.values[key]


def inside(path: str, where: str) -> str:
    """`path` normalised; raises `UserError` with `where` if it leads out of the image folder that it is relative to."""
    if sound(path) != path:
        raise UserError(f"{where}: image {path!r} has half a character in it, which no file name can have; correct it")
    normal = os.path.normpath(path)
    if os.path.isabs(normal) or "\0" in normal or normal.split(os.sep)[0] in (os.pardir, os.curdir):
        raise UserError(f"{where}: image {path!r} lies outside the image folder; give a path relative to the folder")
    return normal


def image_path(template: str, where: str, *values: Any, **named: Any) -> str:
    """The path that `template` (the config's ``image``) makes of an image's number or name, normalised.

    Raises:
        UserError: with `where`, if the template has another placeholder or the path leads out of the image folder.
    """
    try:
        path = template.format(*values, **named)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        allowed = " or ".join(["{}", *(f"{{{name}}}" for name in named)])
        raise UserError(
            f"image: {template!r} of the split cannot be filled in for {where} ({type(error).__name__}: {error}); "
            f"use {allowed}, as in val2014/COCO_val2014_{{:012d}}.jpg"
        ) from error
    return inside(path, where)


def sound(text: str) -> str:
    """`text` with a question mark for each half of a character: JSON may hold such, but they cannot be stored."""
    return text.encode("utf-8", "replace").decode()


def digits(given: Any, where: str) -> int | None:
    """`given` if it is an integer, or digits as in tables; None: it is another thing. `UserError` where it has over 64 bits."""
    if isinstance(given, bool) or not (isinstance(given, int) or (isinstance(given, str) and given.isdecimal())):
        return None
    text = str(given)
    if len(text.lstrip("-0")) > _LONGEST_NUMBER or not -(2**63) <= int(text) < 2**63:
        raise UserError(f"{where} must be a number below 2**63, got {text[:60]}")
    return int(text)


def read_entries(path: str | Path) -> Iterator[Entry]:
    """The objects of a ``.json`` file (a list), a ``.jsonl`` file (one per line), or the rows of a ``.csv`` or ``.tsv`` file.

    Raises:
        UserError: no such file, not UTF-8, invalid JSON (with its line), another structure, or no entry at all.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _some(_lines(path), path)
    if suffix in _SEPARATORS:
        return _some(_rows(path, _SEPARATORS[suffix]), path)
    return _some(_items(path), path)


def read_lists(path: str | Path, needed: str, *others: str) -> list[Iterator[Entry]]:
    """The objects in the lists at some keys of a ``.json`` file that is one object, which is read as a whole.

    Raises:
        UserError: as `read_entries`; the list at `needed` is not there, and the others may not be.
    """
    whole = _object(Path(path))
    found = {key: whole.get(key, None if key == needed else []) for key in (needed, *others)}
    for key, values in found.items():
        if not isinstance(values, list):
            raise UserError(f"{path} must have a list at {key!r}, not {_short(values)}")
    if not found[needed]:
        raise UserError(f"annotation file {path} has no entries at {needed!r}")
    return [_listed(Path(path), key, values) for key, values in found.items()]


def read_mapping(path: str | Path) -> Iterator[tuple[str, Entry]]:
    """The keys of a ``.json`` file that is one object, each with its value, an object. Errors as `read_entries`."""
    found = _object(Path(path))
    if not found:
        raise UserError(f"annotation file {path} has no entries")
    return ((key, _entry(Path(path), repr(key), values)) for key, values in found.items())


def _listed(path: Path, key: str, values: list[Any]) -> Iterator[Entry]:
    return (_entry(path, f"{key} {index}", each) for index, each in enumerate(values))


def _some(found: Iterator[tuple[str, Any]], path: Path) -> Iterator[Entry]:
    """The entries that `found` gives as (where in the file, values); at least one."""
    empty = True
    for at, values in found:
        empty = False
        yield _entry(path, at, values)
    if empty:
        raise UserError(f"annotation file {path} has no entries")


def _entry(path: Path, at: str, values: Any) -> Entry:
    if not isinstance(values, dict):
        raise UserError(f"{path}, {at} must be an object with keys and values, got {_short(values)}")
    return Entry(f"{path}, {at}", values)


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """The items of a file that is one JSON list, one after the other."""
    decoder, index = json.JSONDecoder(), 0
    with _opened(path) as binary, io.TextIOWrapper(binary, encoding="utf-8") as file:
        text = _Window(path, file)
        if text.next() not in ("[", ""):
            hint = "one object per line needs the suffix .jsonl"
            raise UserError(f"{path} must hold a list of entries, not {text.beginning()}; {hint}")
        text.take("[", "Expecting value")
        while text.next() != "]":
            if index:
                text.take(",", "Expecting ',' delimiter")
                text.next()
            yield f"entry {index}", text.value(decoder)
            index += 1
        text.take("]", "Expecting ',' delimiter")
        if text.next():
            raise text.invalid("Extra data")


class _Window:
    """The part of a JSON text that is in memory; `at` is where reading goes on."""

    def __init__(self, path: Path, file: IO[str]):
        self._path, self._file, self._text, self.at = path, file, file.read(_CHUNK), 0
        self._lines, self._columns = 0, 0  # that went by before the window: whole lines, and characters of the last one

    def next(self) -> str:
        """The next character that is no blank, where `at` is then; "" at the end."""
        while True:
            self.at = _BLANKS.match(self._text, self.at).end()
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._read():
                return ""

    def take(self, mark: str, otherwise: str) -> None:
        """Go behind `mark`, which has to be the next character that is no blank; `otherwise` is what to say."""
        if self.next() != mark:
            raise self.invalid(otherwise)
        self.at += 1

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The value that begins at `at`, which is behind it then."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self.at)
                if end < len(self._text) or not self._read():  # a number at the end might go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_WORD
                ahead = error.pos - self.at
                if not cut or len(self._text) - self.at > _LONGEST_ENTRY or not self._read():
                    self.at += ahead
                    raise self.invalid(error.msg) from error
            except RecursionError as error:
                raise _too_deep(self._path) from error

    def beginning(self) -> str:
        """What comes next, for messages."""
        text = self._text[self.at : self.at + 61]
        return " ".join((text if len(text) <= 60 else text[:57] + "...").split())

    def invalid(self, why: str) -> UserError:
        """What is wrong at `at`."""
        before = self._text[: self.at]
        line, last = self._lines + before.count("\n") + 1, before.rfind("\n")
        return _invalid(self._path, line, self.at - last if last >= 0 else self._columns + self.at + 1, why)

    def _read(self) -> bool:
        more, last = self._file.read(_CHUNK), self._text.rfind("\n", 0, self.at)
        self._lines += self._text.count("\n", 0, self.at)
        self._columns = self.at - last - 1 if last >= 0 else self._columns + self.at
        self._text, self.at = self._text[self.at :] + more, 0
        return bool(more)


def _object(path: Path) -> dict[str, Any]:
    with _opened(path):
        found = _whole(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold an object, not {_short(found)}")
    return found


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.decode("utf-8"))
                except json.JSONDecodeError as error:
                    raise _invalid(path, number, error.colno, error.msg) from error
                except RecursionError as error:
                    raise _too_deep(path) from error


def _rows(path: Path, separator: str) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        rows = csv.reader((line.decode("utf-8") for line in file), delimiter=separator, strict=True)
        try:
            names = next(rows, [])
            twice = next((name for name in names if name and names.count(name) > 1), None)
            if twice:
                raise UserError(f"{path} has two columns named {twice!r} in its first line; name or remove one of them")
            for row in rows:
                if not row:
                    continue
                if len(row) != len(names):
                    raise UserError(f"{path}, line {rows.line_num} has {len(row)} columns, but the first line has {len(names)}")
                yield f"line {rows.line_num}", {name: value for name, value in zip(names, row, strict=True) if value}
        except csv.Error as error:
            raise UserError(f"{path} is no valid {path.suffix[1:]} file at line {rows.line_num}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes behind a byte order mark."""
    try:
        with path.open("rb") as file:
            if file.read(len(_BOM)) != _BOM:
                file.seek(0)
            yield file
    except FileNotFoundError as error:
        raise UserError(f"annotation file {path} does not exist") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:  # not UTF-8, or a number of thousands of digits
        raise UserError(f"annotation file {path} cannot be read: {error}") from error


def _whole(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise _invalid(path, error.lineno, error.colno, error.msg) from error
    except RecursionError as error:
        raise _too_deep(path) from error


def _invalid(path: Path, line: int, column: int, why: str) -> UserError:
    return UserError(f"{path} is not valid JSON at line {line}, column {column}: {why}")


def _too_deep(path: Path) -> UserError:
    return UserError(f"{path} is nested too deeply to be an annotation file")


def _short(value: Any) -> str:
    text = sound(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 60 else text[:57] + "..."
