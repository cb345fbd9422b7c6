"""A blip2x checkpoint: a folder with model.safetensors, tokenizers, and manifest.json, which is written last and lists both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from blip2x.errors import UserError

FORMAT = 1
MANIFEST, MODEL_FILE = "manifest.json", "model.safetensors"


def read_manifest(folder: str | Path, *, every_byte: bool = False) -> dict[str, Any]:
    """The manifest of a whole checkpoint: every file it lists is there, of the recorded size, the small ones unchanged.

    The numbers of model.safetensors are checked tensor by tensor when they are read, by the checksums in its header; with
    `every_byte` here as well.

    Raises:
        UserError: there is no checkpoint, it is of another format, or a file is missing or was changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no checkpoint at {folder}: there is no such folder")
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"no checkpoint at {folder}: it has no {MANIFEST} (a checkpoint that was not finished has none)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        _ = manifest["tensors"], manifest["frozen"]["origin"], manifest["extra"]  # their absence is damage, too
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the checkpoint again") from error
    if version != FORMAT:
        raise UserError(f"{path} has format {version!r}; this version of blip2x reads format {FORMAT}")
    for name, (size, recorded) in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing from the checkpoint; copy the checkpoint again")
        if file.stat().st_size != size:
            raise UserError(
                f"{file} is damaged: {file.stat().st_size:,} bytes, recorded are {size:,}; copy the checkpoint again"
            )
        if (every_byte or name != MODEL_FILE) and sha256(file) != recorded:
            raise UserError(f"{file} is damaged: its sha256 is not the one in {MANIFEST}; copy the checkpoint again")
    return manifest


def frozen_origins(folder: str | Path) -> dict[str, str]:
    """Part -> where its frozen weights come from, as recorded when the checkpoint was saved."""
    return dict(read_manifest(folder)["frozen"]["origin"])


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
