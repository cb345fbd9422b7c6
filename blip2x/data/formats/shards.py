"""Shards of webdataset: tar files with KEY.jpg and KEY.json ({"caption"}) or KEY.txt beside each other.

As there, a key goes up to the first dot of a name, and upper case is no other ending. KEY.mask.png is neither a picture of KEY
nor of KEY.mask; what is hidden, as the ._KEY.jpg of a Mac, is nothing.

Each shard is read once, for the places of its members; pictures are then read from there. So the order of samples can be
drawn anew in each epoch and followed from any sample on, which a stream of shards cannot.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.annotations import inside, sound
from blip2x.data.formats.entries import trailing_number
from blip2x.data.picture_inputs import is_picture_name
from blip2x.data.rows import CaptionRow, QuestionRow
from blip2x.data.tokenize import clean_caption
from blip2x.errors import UserError
from blip2x.registry import ANNOTATION_FORMATS


@ANNOTATION_FORMATS.register("shards")
class Shards:
    """``captions`` is a folder of shards or a pattern, below the image folder; without a usable caption nothing is a sample."""

    def __init__(self, files: AnnotationFiles, images: Path):
        self._folder, self._images = images / files.captions, images
        self._pattern = os.path.join(glob.escape(str(images)), files.captions)

    def files(self) -> list[Path]:
        """All shards, in the order of their names."""
        if self._folder.is_dir():
            found = sorted(self._folder.rglob("*.tar"))
        else:
            found = sorted(map(Path, glob.glob(self._pattern, recursive=True)))
        if not found:
            raise UserError(f"{self._folder} has no shard; give a folder of .tar files, or a pattern as in shards/*.tar")
        return found

    def captions(self) -> Iterator[CaptionRow]:
        """One row per picture with a caption, shard after shard."""
        empty = True
        for path in self.files():
            for row in self._shard(path):
                empty = False
                yield row
        if empty:
            raise UserError(f"the shards of {self._folder} have no picture with a caption, as 1.jpg with 1.txt or 1.json")

    def questions(self) -> Iterator[QuestionRow]:
        """There are none in shards."""
        raise UserError("format: shards has no questions; the format of a file of questions must be vqa, gqa or entries")

    def _shard(self, path: Path) -> Iterator[CaptionRow]:
        stored = inside(os.path.relpath(path, self._images), f"shard {path}")
        key, members = "", {}
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                size = os.fstat(file.fileno()).st_size
                for member in tar:
                    if not member.isfile():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    folder, name = os.path.split(member.name)
                    stem, _, ending = name.partition(".")
                    if not stem:
                        continue
                    stem = os.path.join(folder, stem)
                    if stem != key:
                        yield from _sample(stored, key, members)
                        key, members = stem, {}
                    sort = "picture" if is_picture_name(name) else ending.lower()
                    if "." in ending or sort not in ("picture", "json", "txt"):
                        continue
                    if sort in members:
                        raise UserError(f"shard {path} has a second {sort} for the key {key!r}, {name!r}; remove one of them")
                    found = (member.name, member.offset_data, member.size)
                    members[sort] = found if sort == "picture" else tar.extractfile(member).read()
                _require_end(file, tar.offset, size)
                yield from _sample(stored, key, members)
        except OSError as error:
            raise UserError(f"shard {path} cannot be read: {error.strerror or error}") from error
        except (tarfile.TarError, EOFError) as error:
            raise UserError(
                f"shard {path} is cut off or no plain tar file ({error}); fetch it again or move it away"
            ) from error


def _require_end(file: IO[bytes], place: int, size: int) -> None:
    """What tarfile took for the end of an archive may be a header that is damaged: the end is empty, or is no more."""
    file.seek(place)
    block = file.read(tarfile.BLOCKSIZE)
    if place != size and block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header at byte {place}")


def _sample(stored: str, key: str, members: dict[str, Any]) -> Iterator[CaptionRow]:
    if "picture" in members:
        name, offset, size = members["picture"]
        name = name.encode("utf-8", "backslashreplace").decode()  # of another encoding; nothing is looked for by this name
        where = f"{stored}, {name}"
        captions = _captions(members, where)
        if captions:
            yield CaptionRow(where, f"{stored}/{name}", captions, trailing_number(key), stored=(stored, offset, size))


def _captions(members: dict[str, Any], where: str) -> tuple[str, ...]:
    """The usable ones of the JSON file, else of the text.

    Of a JSON list, those of the first two entries: LAION's own and the one that was written for it.
    """
    try:
        told = json.loads(members.get("json", "[]"))
        captions = _usable(entry.get("caption") for entry in (told[:2] if isinstance(told, list) else [told]))
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: the text beside it cannot be read: {error}") from error
    return captions or _usable([members.get("txt", b"").decode("utf-8-sig", errors="replace")])


def _usable(texts: Iterable[Any]) -> tuple[str, ...]:
    """Those that are more than punctuation."""
    return tuple(sound(text).strip() for text in texts if isinstance(text, str) and clean_caption(text))
