"""``.blip2x-prepared.json`` in the data folder: what is fetched and unpacked, so that no run looks twice."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from blip2x.transfer.files import locked, read_json, write_json

NAME = ".blip2x-prepared.json"


class Prepared:
    """What is known about files, by their path; several processes may write to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / NAME

    def get(self, path: Path) -> dict[str, Any]:
        """What was said about a file; {}: nothing."""
        found = (read_json(self.path) or {}).get(self.key(path))
        return found if isinstance(found, dict) else {}

    def put(self, path: Path, what: dict[str, Any]) -> None:
        """Say `what` about a file; where the folder cannot be written, the next run has to look again."""
        with suppress(OSError):  # a folder that several share may be read-only
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.path, say=lambda line: None):  # it takes a moment
                content = read_json(self.path) or {}
                write_json(self.path, content | {self.key(path): what}, indent=1)

    def key(self, path: Path) -> str:
        """The path as the file has it: below the data folder, so that this can be moved."""
        try:
            return Path(os.path.abspath(path)).relative_to(os.path.abspath(self.folder)).as_posix()
        except ValueError:
            return os.path.abspath(path)
