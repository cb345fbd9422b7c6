"""Shards of webdataset: tar files with KEY.jpg and KEY.json ({"caption"}) or KEY.txt beside each other.

Each shard is read once, for the places of its members; pictures are then read from there. So the order of samples can be
drawn anew in each epoch and followed from any sample on, which a stream of shards cannot.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.entries import trailing_number
from blip2x.data.picture_inputs import is_picture_name
from blip2x.data.rows import CaptionRow, QuestionRow
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS


@ANNOTATION_FORMATS.register("shards")
class Shards:
    """``captions`` is a folder of shards or a pattern, below the image folder; members without a partner are no sample."""

    def __init__(self, files: AnnotationFiles, images: Path):
        self._pattern, self._images = str(images / files.captions), images

    def files(self) -> list[Path]:
        """All shards, in the order of their names."""
        path = Path(self._pattern)
        found = sorted(path.rglob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(self._pattern, recursive=True)))
        if not found:
            raise UserError(f"{self._pattern} has no shard; give a folder of .tar files, or a pattern as in shards/*.tar")
        return found

    def captions(self) -> Iterator[CaptionRow]:
        """One row per picture with a caption, shard after shard."""
        for path in self.files():
            yield from self._shard(path)

    def questions(self) -> Iterator[QuestionRow]:
        """There are none in shards."""
        raise UserError("format: shards has no questions; the format of a file of questions must be vqa, gqa or entries")

    def _shard(self, path: Path) -> Iterator[CaptionRow]:
        stored = os.path.relpath(path, self._images)
        if stored.startswith(os.pardir):
            raise UserError(f"shard {path} lies outside the image folder {self._images}")
        size, key, members = path.stat().st_size, None, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    name = os.path.basename(member.name)
                    stem = member.name[: len(member.name) - len(name)] + name.split(".", 1)[0]
                    if stem != key:
                        yield from _sample(stored, key, members)
                        key, members = stem, {}
                    if is_picture_name(name):
                        members["picture"] = (member.name, member.offset_data, member.size)
                    elif name.endswith((".json", ".txt")):
                        members[name.rpartition(".")[2]] = tar.extractfile(member).read()
                yield from _sample(stored, key, members)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"shard {path} is cut off or no plain tar file ({error}); fetch it again or move it away"
            ) from error


def _sample(stored: str, key: str | None, members: dict[str, Any]) -> Iterator[CaptionRow]:
    if "picture" in members:
        name, offset, size = members["picture"]
        where = f"{stored}, {name}"
        captions = _captions(members, where)
        if captions:
            yield CaptionRow(where, f"{stored}/{name}", captions, trailing_number(key), stored=(stored, offset, size))


def _captions(members: dict[str, Any], where: str) -> tuple[str, ...]:
    """Those of the JSON file: of a list, the first two entries' (LAION's own and the one that was written for it)."""
    try:
        if "json" in members:
            told = json.loads(members["json"])
            told = [entry["caption"] for entry in (told[:2] if isinstance(told, list) else [told]) if entry.get("caption")]
        else:
            told = [members["txt"].decode("utf-8")] if "txt" in members else []
        return tuple(text.strip() for text in told if text.strip())
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{where}: the text beside it cannot be read: {error}") from error
