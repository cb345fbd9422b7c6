"""Pictures inside tar files, as webdataset packs them: found by their place in the file, so that nothing is unpacked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip2x.data.pictures import Crop, decode_picture, file_identity
from blip2x.errors import UserError


@dataclass(frozen=True)
class StoredImage:
    """A picture whose file is `length` bytes of another file, from `offset` on."""

    path: Path
    offset: int
    length: int
    name: str
    max_pixels: int

    @property
    def identity(self) -> str:
        """That of the shard, the place in it, and what size is refused."""
        return f"{file_identity(self.path, f'shard {self.path}')} {self.offset} {self.length} {self.max_pixels}"

    def open(self, crop: Crop | None = None) -> Image.Image:
        """Decode to RGB, see `decode_picture`; raises `UserError` if that is impossible."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise UserError(f"shard {self.path} cannot be read: {error.strerror}") from error
        return decode_picture(data, self.name, self.max_pixels, crop)
