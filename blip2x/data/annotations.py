"""Reading annotation files: COCO-Karpathy style captions and VQA style questions, checked entry by entry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2x.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One object of an annotation file; `where` names it in messages."""

    where: str
    values: dict[str, Any]

    @cached_property
    def image(self) -> str:
        """The image's path relative to the image folder, normalised; it may not lead out of the folder."""
        given = self._get("image")
        if not isinstance(given, str) or not given.strip():
            raise UserError(f"{self.where}: 'image' must be the path of a file below the image folder, got {given!r}")
        path = os.path.normpath(given)
        if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
            raise UserError(f"{self.where}: image {given!r} lies outside the image folder; give a path relative to the folder")
        return path

    def texts(self, key: str) -> tuple[str, ...]:
        """The value of `key`, a text or a list of texts, none of them empty."""
        given = self._get(key)
        texts = given if isinstance(given, list) else [given]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{self.where}: {key!r} must be a text or a list of texts, got {_short(given)}")
        if not all(text.strip() for text in texts):
            raise UserError(f"{self.where}: {key!r} is empty; give a text or remove the entry")
        return tuple(text.strip() for text in texts)

    def text(self, key: str) -> str:
        """The value of `key`, one text that is not empty."""
        texts = self.texts(key)
        if len(texts) != 1:
            raise UserError(f"{self.where}: {key!r} must be one text, got {_short(self.values[key])}")
        return texts[0]

    def _get(self, key: str) -> Any:
        if key not in self.values:
            raise UserError(f"{self.where} has no {key!r}; its keys: {', '.join(map(repr, self.values)) or 'none'}")
        return self.values[key]


def read_entries(path: str | Path) -> list[Entry]:
    """The objects of a ``.json`` file (a list) or a ``.jsonl`` file (one per line).

    Raises:
        UserError: no such file, not UTF-8, invalid JSON (with its line), another structure, or no entry at all.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"annotation file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"annotation file {path} cannot be read: {error}") from error
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.splitlines(), start=1)
        found = [(f"{path}, line {n}", _parse(line, lambda _, n=n: n, path)) for n, line in lines if line.strip()]
    else:
        whole = _parse(text, lambda error: error.lineno, path)
        if not isinstance(whole, list):
            raise UserError(
                f"{path} must hold a list of entries, not {_short(whole)}; one object per line needs the suffix .jsonl"
            )
        found = [(f"{path}, entry {index}", values) for index, values in enumerate(whole)]
    if not found:
        raise UserError(f"annotation file {path} has no entries")
    for where, values in found:
        if not isinstance(values, dict):
            raise UserError(f"{where} must be an object with keys and values, got {_short(values)}")
    return [Entry(where, values) for where, values in found]


def _parse(text: str, line_of: Callable[[json.JSONDecodeError], int], path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON at line {line_of(error)}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply to be an annotation file") from error


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
