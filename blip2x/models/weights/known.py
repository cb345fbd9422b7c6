"""Published weights by name: where each is on the web, and where it goes below ``paths.weights``.

A folder is fetched as ``.name.partial`` and renamed when its last file is there. So a folder that has its proper name is whole,
and one that was put there by hand needs no mark to be taken for whole.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from blip2x.errors import UserError
from blip2x.transfer.download import NotServedError, download
from blip2x.transfer.files import locked, move

HUGGING_FACE = (
    *(f"Salesforce/blip2-{name}" for name in ("opt-2.7b", "opt-6.7b", "opt-2.7b-coco", "opt-6.7b-coco")),
    *(f"Salesforce/blip2-{name}" for name in ("flan-t5-xl", "flan-t5-xl-coco", "flan-t5-xxl")),
    *(f"Salesforce/blip2-{name}" for name in ("itm-vit-g", "itm-vit-g-coco")),
    *("facebook/opt-2.7b", "facebook/opt-6.7b", "google/flan-t5-xl", "google/flan-t5-xxl", "bert-base-uncased"),
)
REPOSITORY = {"bert-base-uncased": "google-bert/bert-base-uncased"}  # where it is not the name
LAVIS = (
    *("blip2_pretrained.pth", "blip2_pretrained_vitL.pth", "blip2_finetune_coco.pth"),
    *(f"blip2_pretrained_{name}.pth" for name in ("opt2.7b", "opt6.7b", "flant5xl", "flant5xxl", "flant5xl_vitL")),
    *(f"blip2_caption_{name}.pth" for name in ("opt2.7b", "opt6.7b", "flant5xl")),
    *("eva_vit_g.pth", "clip_vit_L.pth"),
)
PADDLEMIX = (
    *(f"paddlemix/blip2-{name}" for name in ("stage1", "stage2", "pretrained-opt2.7b", "pretrained-opt6.7b")),
    *(f"paddlemix/blip2-{name}" for name in ("caption-opt2.7b", "caption-opt6.7b")),
    # announced with underscores, and in 2024 "to be released"
    *(f"paddlemix/blip2_{name}" for name in ("pretrained_flant5xl", "pretrained_flant5xxl")),
    *(f"paddlemix/blip2_{name}" for name in ("caption_flant5xl", "caption_flant5xl.7b")),
)
ALIASES = {
    "google-bert/bert-base-uncased": "bert-base-uncased",
    **{name.removesuffix(".pth"): name for name in LAVIS},
    # LAVIS: vit_model, and the name and model_type of load_model
    "eva_clip_g": "eva_vit_g.pth",
    "clip_L": "clip_vit_L.pth",
    "blip2/pretrain": "blip2_pretrained.pth",
    "blip2/pretrain_vitL": "blip2_pretrained_vitL.pth",
    "blip2/coco": "blip2_finetune_coco.pth",
    **{f"blip2_opt/pretrain_{size}": f"blip2_pretrained_{size}.pth" for size in ("opt2.7b", "opt6.7b")},
    **{f"blip2_opt/caption_coco_{size}": f"blip2_caption_{size}.pth" for size in ("opt2.7b", "opt6.7b")},
    **{f"blip2_t5/pretrain_{size}": f"blip2_pretrained_{size}.pth" for size in ("flant5xl", "flant5xl_vitL", "flant5xxl")},
    "blip2_t5/caption_coco_flant5xl": "blip2_caption_flant5xl.pth",
}

ADDRESSES = {  # environment variable -> what it replaces, e.g. by a mirror
    "HF_ENDPOINT": "https://huggingface.co",
    "BLIP2X_LAVIS_URL": "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2",
    "BLIP2X_PADDLEMIX_URL": "https://bj.bcebos.com/paddlenlp/models/community",
}

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARY = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_SETTINGS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class _Source:
    """What is fetched for a name."""

    place: str  # below paths.weights
    url: str  # of the file, or of the folder
    required: tuple[str, ...] = ()  # files of the folder; none: it is one file
    optional: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()  # the first of these that is there


def known_names() -> list[str]:
    """All names that `locate` can fetch, without other spellings of the same."""
    return [*HUGGING_FACE, *LAVIS, *PADDLEMIX]


def is_known(name: str) -> bool:
    """Whether `locate` can fetch it."""
    return ALIASES.get(name, name) in known_names()


def locate(name: str, root: Path, *, offline: bool, key: str) -> Path:
    """The file or folder that the config's `key` calls `name`: what is there; else, for a known name, what is fetched.

    Args:
        name: a path, or a name below `root`.
        root: the config's paths.weights.
        offline: nothing is fetched.
        key: for messages.

    Raises:
        UserError: it is not there, and cannot or may not be fetched; it says which files to put where.
    """
    target = root / ALIASES.get(name, name)
    for path in (Path(name), root / name, target):
        if path.exists():
            return path
    return _fetched(name, target, _source(ALIASES.get(name, name)) if is_known(name) else None, offline=offline, key=key)


def locate_tokenizer(name: str, root: Path, *, offline: bool, key: str) -> Path:
    """As `locate`, but of what is not there the tokenizer's files alone are fetched, into ``tokenizers`` below `root`."""
    plain = ALIASES.get(name, name)
    target = root / "tokenizers" / plain
    for path in (Path(name), root / name, root / plain, target):
        if path.exists():
            return path
    source = replace(_source(plain), weights=()) if plain in HUGGING_FACE else None
    return _fetched(name, target, source, offline=offline, key=key)


def _fetched(name: str, target: Path, source: _Source | None, *, offline: bool, key: str) -> Path:
    if source is None:
        raise UserError(
            f"{key}={name}: there is no {name} and no {target}, and nothing that is published has that name; {_hint(name)}"
        )
    if offline:
        raise UserError(f"{key}={name}: there is no {target}, and nothing may be fetched. {_by_hand(source, target)}")
    try:
        _fetch(source, target)
    except NotServedError as error:
        raise UserError(f"{key}={name}: {error}; if you have it from elsewhere, put it there as {target}") from error
    except UserError as error:
        raise UserError(f"{key}={name}: {error}\nIt can also be fetched by hand. {_by_hand(source, target)}") from error
    return target


def _source(name: str) -> _Source:
    huggingface, lavis, paddlemix = ((os.environ.get(key) or url).rstrip("/") for key, url in ADDRESSES.items())
    if name in LAVIS:
        return _Source(name, f"{lavis}/{name}")
    if name in PADDLEMIX:
        optional = ("config.json", "image_preprocessor_config.json", "text_preprocessor_config.json")
        return _Source(name, f"{paddlemix}/{name}", ("model_state.pdparams",), optional)
    url = f"{huggingface}/{REPOSITORY.get(name, name)}/resolve/main"
    return _Source(name, url, ("config.json",), (*_SETTINGS, *_TOKENIZER, *_VOCABULARY), _WEIGHTS)


def _fetch(source: _Source, target: Path) -> None:
    if not source.required:
        download(source.url, target)
        return
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            if target.exists():  # another process has fetched it meanwhile
                return
            partial.mkdir(exist_ok=True)
            _fetch_files(source, partial)
            for leftover in partial.glob(".*"):  # of processes that were killed
                if not leftover.name.endswith(".origin.json"):
                    leftover.unlink()
            move(partial, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error


def _fetch_files(source: _Source, folder: Path) -> None:
    for name in source.required:
        download(f"{source.url}/{name}", folder / name)
    for name in source.optional:
        _fetch_optional(source, folder, name)
    if not source.weights:
        return
    found = next((name for name in source.weights if _fetch_optional(source, folder, name)), None)
    if found is None:
        raise UserError(f"{source.url} has no weights: none of {', '.join(source.weights)} is there")
    if found.endswith(_INDEX):
        for name in _shards(folder / found):
            download(f"{source.url}/{name}", folder / name)


def _fetch_optional(source: _Source, folder: Path, name: str) -> bool:
    """Whether it is there. Some storages refuse what does not exist, lest anybody find out what does."""
    try:
        download(f"{source.url}/{name}", folder / name)
    except NotServedError:
        return False
    return True


def _shards(index: Path) -> Iterable[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # a name with a folder could be a file anywhere, one with a dot a file of `download`
        strange = sorted(str(name) for name in names if not _is_plain(name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        index.unlink()
        raise UserError(f"{index.name} is no index of weights ({type(error).__name__}); it was removed, try again") from error
    if strange:
        index.unlink()
        raise UserError(f"{index.name} lists {strange[0]!r}, which is no plain file name; do not trust where it came from")
    return sorted(names)


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def _by_hand(source: _Source, target: Path) -> str:
    """Which files to fetch from where."""
    if not source.required:
        return f"Put this file there as {target}:\n  {source.url}"
    lines = [f"Put these files into {target}:", *(f"  {source.url}/{name}" for name in source.required)]
    if source.weights:
        lines.append("the first of these that exists, with all the files that it lists if it is an index:")
        lines += [f"  {source.url}/{name}" for name in source.weights]
    return "\n".join([*lines, "and those of these that exist:", *(f"  {source.url}/{name}" for name in source.optional)])


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, [*known_names(), *ALIASES], n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if Path(name).is_absolute() or name.startswith("."):
        return "give the path of your own, or a name such as Salesforce/blip2-opt-2.7b"
    return f"give the path of your own, or one of: {', '.join(known_names())}"
