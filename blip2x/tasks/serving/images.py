"""Images that questions may come about: what the model made of them, not the pictures."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoded:
    """One image's queries as the model reads them (on its device), their memory, and the picture's size in pixels."""

    queries: Any
    memory: int  # bytes
    width: int
    height: int


class KeptImages:
    """The images that were last asked about; for one thread.

    Args:
        most: images.
        memory: bytes of all together; the newest is kept in any case.
    """

    def __init__(self, most: int, memory: float):
        self._most, self._memory = most, memory
        self._images: OrderedDict[str, Encoded] = OrderedDict()

    def __len__(self) -> int:
        return len(self._images)

    def add(self, image: Encoded) -> str:
        """Keep `image`, forget those that nobody asked about for longest; the id to ask with, which cannot be guessed."""
        key = secrets.token_urlsafe(16)
        self._images[key] = image
        while len(self) > 1 and (len(self) > self._most or self.memory > self._memory):
            self._images.popitem(last=False)
        return key

    def get(self, key: str) -> Encoded | None:
        """The image; None: it was never there, or is forgotten."""
        if key in self._images:
            self._images.move_to_end(key)
        return self._images.get(key)

    @property
    def memory(self) -> int:
        """Bytes of all."""
        return sum(image.memory for image in self._images.values())
