"""What became of each address that pictures were asked for at, and where the pictures are."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from blip2x.transfer.linked_picture import FORMATS
from blip2x.transfer.links import Link

RECORD = ".links.tsv"  # in the folder of the pictures
ENDINGS = sorted(FORMATS.values())
FAILED = 255  # in the place of an ending


class Record:
    """What became of each address; nine bytes of memory each."""

    def __init__(self, path: Path):
        keys, codes = array("Q"), array("B")
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    fields = line.split(b"\t")
                    # else the run was killed while it wrote, or the disk has lost some of it
                    if line.endswith(b"\n") and len(fields) == 3 and re.fullmatch(rb"[0-9a-f]{24}", fields[0]):
                        state = fields[1].decode(errors="replace")
                        keys.append(int(fields[0][:16], 16))
                        codes.append(ENDINGS.index(state) if state in ENDINGS else FAILED)
        found = np.frombuffer(keys, dtype=np.uint64)
        order = np.argsort(found, kind="stable")  # the last line of an address holds
        self._keys = found[order]
        self._codes = np.frombuffer(codes, dtype=np.uint8)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def look_up(self, keys: Sequence[str]) -> list[int | None]:
        """The place of each picture's ending, or `FAILED`; None: not asked for yet."""
        wanted = np.array([int(key[:16], 16) for key in keys], dtype=np.uint64)
        if not len(self._keys):
            return [None] * len(keys)
        place = np.searchsorted(self._keys, wanted, side="right") - 1
        hits = (place >= 0) & (self._keys[place] == wanted)
        return [int(self._codes[at]) if hit else None for at, hit in zip(place, hits, strict=True)]


def is_there(images: Path, link: Link, found: int | None) -> bool:
    """Whether the picture of which `Record.look_up` says `found` is still in the folder `images`, with something in it."""
    if found in (None, FAILED):
        return False
    path = images / place(link, ENDINGS[found])
    return os.path.isfile(path) and path.stat().st_size > 0  # which takes a name that is too long for none


def place(link: Link, ending: str) -> str:
    """Where a picture is, below the folder of all."""
    return link.name or f"{link.key[:3]}/{link.key[3:]}.{ending}"  # 4,096 folders
