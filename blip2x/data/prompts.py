"""Prompts by file: the same ones for all pictures, or each picture's own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blip2x.data.annotations import read_entries, sound
from blip2x.data.download import is_web_address
from blip2x.errors import UserError

_TABLES = (".jsonl", ".csv")
_KEYS = ("image", "prompt")


@dataclass(frozen=True)
class Prompts:
    """What a file asks; one of both is empty."""

    shared: list[str]  # of every picture
    own: dict[str, list[str]]  # path or address of a picture -> what is asked of it, in the file's order


def read_prompts(path: str) -> Prompts:
    """The prompts of a ``.txt`` file, one per line, or of a ``.jsonl`` or ``.csv`` file with "prompt" and perhaps "image".

    Paths of images are relative to the file's folder; that they are there is seen to, while addresses are not tried.

    Raises:
        UserError: another kind of file, one that cannot be read or has no prompt, an unknown key, an image in some entries only
            or one that is not there.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".txt":
        return Prompts(_text_lines(path), {})
    if suffix not in _TABLES:
        raise UserError(f"task.prompts={path}: prompts are in a .txt file, one per line, or in a .jsonl or .csv file")
    shared: list[str] = []
    own: dict[str, list[str]] = {}
    for entry in read_entries(path):
        unknown = [key for key in entry.values if key not in _KEYS]
        if unknown:
            raise UserError(f"task.prompts: {entry.where} has the unknown key {unknown[0]!r}; known: {', '.join(_KEYS)}")
        prompt = entry.text("prompt")
        if "image" in entry.values:
            own.setdefault(_picture(entry.values["image"], path, entry.where), []).append(prompt)
        else:
            shared.append(prompt)
        if own and shared:
            raise UserError(f"task.prompts: {entry.where}: either all entries of {path} name an image or none does")
    return Prompts(shared, own)


def _text_lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"task.prompts={path} does not exist") from error
    except (OSError, ValueError) as error:  # not UTF-8
        raise UserError(f"task.prompts={path} cannot be read: {error}") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"task.prompts={path} has no prompt; write one per line")
    return lines


def _picture(given: object, path: str, where: str) -> str:
    if isinstance(given, str) and is_web_address(given):
        return given
    if not isinstance(given, str) or sound(given) != given or "\0" in given:
        raise UserError(f"task.prompts: {where}: 'image' must be a path or an address, got {given!r}")
    picture = os.path.normpath(os.path.join(os.path.dirname(path), os.path.expanduser(given)))
    if not os.path.isfile(picture):
        raise UserError(f"task.prompts: {where}: there is no picture {picture!r}; paths are relative to the folder of {path}")
    return picture
