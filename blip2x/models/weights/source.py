"""A checkpoint of any family as tensors with our names in our layout: each of its names is used, or left out with a reason."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blip2x.errors import UserError
from blip2x.models.weights.manifest import MANIFEST, MODEL_FILE, read_manifest
from blip2x.models.weights.names.huggingface import HUGGINGFACE
from blip2x.models.weights.names.language import BERT, OPT, T5
from blip2x.models.weights.names.lavis import CLIP, EVA, LAVIS
from blip2x.models.weights.names.paddlemix import PADDLEMIX
from blip2x.models.weights.names.table import Table
from blip2x.models.weights.stored import StoredTensor, read_json
from blip2x.models.weights.tensor_files import open_tensors

SETTINGS_FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
_WHOLE = ("vision.", "ln_vision.", "qformer.", "language.", "language_proj.", "vision_proj.", "text_proj.", "itm_head.", "temp")
_ALONE = {"embeddings.class_token": "vision.", "query_tokens": "qformer."}  # a name in a part that was saved alone; the part
_QKV_BIAS = re.compile(r"(vision\.blocks\.\d+\.attention\.)qkv\.bias")
_ROWS_AT_ONCE = 1 << 12


class Used(NamedTuple):
    """What became of a tensor of the file: `ours` is its name here, None where it was left out for `reason`."""

    theirs: str
    ours: str | None
    reason: str  # or what was done to it
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """Weights of a whole model or of parts of it.

    Attributes:
        path: the folder or file.
        family: of which system's files they are.
        tensors: by the whole model's names ("vision.blocks.0.norm1.weight"), in our layout; read when asked for.
        coverage: one entry per name in the file and name of ours that it makes.
        settings: Hugging Face's JSON files beside the weights, by name ("config.json"); a converted checkpoint keeps them.
        manifest: of a blip2x checkpoint, or {}.
    """

    path: Path
    family: str
    tensors: dict[str, StoredTensor]
    coverage: list[Used]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """Hugging Face's config.json, or {}."""
        return self.settings.get("config.json", {})

    def has(self, *starts: str) -> bool:
        """Whether a name of ours starts with one of `starts`."""
        return any(name.startswith(starts) for name in self.tensors)

    @property
    def what(self) -> str:
        """What the tensors are, in words."""
        if self.has("language_proj."):
            return "stage 2"
        if self.has("itm_head.", "vision_proj."):
            return "stage 1"
        parts = {"vision.": "an image encoder", "language.": "a language model", "qformer.": "a Q-Former"}
        found = [words for start, words in parts.items() if self.has(start)]
        return " and ".join(found) or "nothing of BLIP-2"

    def summary(self) -> str:
        """One line: how many names were used, and how many left out for which reason."""
        used = len({row.theirs for row in self.coverage if row.ours})
        left_out = Counter(row.reason for row in self.coverage if not row.ours)
        parts = [f"{used} of {len({row.theirs for row in self.coverage})} tensors of {self.path} ({self.family}) are used"]
        return "; ".join([*parts, *(f"{count} left out ({reason})" for reason, count in left_out.items())])


def open_source(path: str | Path) -> Source:
    """The weights at `path`: a Hugging Face folder, a LAVIS .pth, a PaddleMIX .pdparams (or its folder), a blip2x checkpoint.

    Only names, shapes and types are read, but for tensors that may be copies of others, which are compared.

    Raises:
        UserError: there are no weights, they are damaged, of no known family, or hold a name that no table knows.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _own(path)
    stored = open_tensors(path)
    family, table = _family(path, stored)
    # PaddleMIX's config.json is in words of its own
    files = () if family in ("LAVIS", "PaddleMIX") else SETTINGS_FILES
    settings = {name: read_json(path / name) for name in files if (path / name).is_file()}
    tensors, coverage = _translate(path, family, table, stored)
    return Source(path, family, tensors, coverage, settings)


def _own(path: Path) -> Source:
    manifest = read_manifest(path)
    stored = open_tensors(path / MODEL_FILE)
    names = [*stored, *manifest["frozen"].get("names", [])]
    # what was fitted alone, is saved alone
    alone = next((part for name, part in _ALONE.items() if name in stored), "language.")
    prefix = "" if not stored or any(name.startswith(_WHOLE) for name in names) else alone
    tensors = {prefix + name: tensor for name, tensor in stored.items()}
    coverage = [Used(name, prefix + name, "as it is", t.shape, str(t.dtype)) for name, t in stored.items()]
    return Source(path, "blip2x", tensors, coverage, manifest["extra"].get("huggingface", {}), manifest)


def _family(path: Path, stored: dict[str, StoredTensor]) -> tuple[str, Table]:
    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in stored)

    if has("Qformer.ln_vision.", "Qformer.query_tokens", "Qformer.language_projection.", "Qformer.vision_proj."):
        return "PaddleMIX", PADDLEMIX
    if has("Qformer.", "ln_vision."):
        return "LAVIS", LAVIS
    if has("qformer.encoder.", "qformer.layernorm.", "vision_model."):
        return "Hugging Face", HUGGINGFACE
    if has("visual_encoder.blocks.") and path.suffix != ".pth":
        return "PaddleMIX", PADDLEMIX
    if has("visual_encoder."):
        return "LAVIS", LAVIS
    if has("encoder.block.") and has("decoder.block."):  # before OPT: some files of T5 have decoder.embed_tokens.weight, too
        return "Hugging Face T5", T5
    for prefix, table in OPT.items():
        if f"{prefix}embed_tokens.weight" in stored:
            return "Hugging Face OPT", table
    if has("blocks.") and has("patch_embed."):
        return "EVA ViT", EVA
    if has("transformer.resblocks."):
        return "CLIP ViT", CLIP
    if has("bert.", "encoder.layer.", "embeddings.word_embeddings."):
        return "BERT", BERT
    raise UserError(
        f"{path} holds no weights that blip2x knows ({', '.join(sorted(stored)[:3])}, ...): Hugging Face's, LAVIS's and "
        "PaddleMIX's BLIP-2, its image encoders, OPT, T5, BERT, and blip2x checkpoints are read"
    )


def _translate(
    path: Path, family: str, table: Table, stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[Used]]:
    tensors: dict[str, StoredTensor] = {}
    coverage: list[Used] = []
    second = {tied.theirs: tied for tied in table.tied}
    unknown = []
    for name, tensor in stored.items():
        plain = _modern(name) if family == "BERT" else name
        tied = second.get(plain)
        if tied and (original := _original(table, stored, tied.ours)) is not None:
            reason = _tied(f"{path}, tensor {name}", tied.change.to_ours(tensor), original, tied.must_equal)
            coverage.append(Used(name, None, reason, tensor.shape, str(tensor.dtype)))
            continue
        found = table.to_ours(plain)
        for ours, change in found:
            if ours in tensors:
                raise UserError(f"{path}: {name} is a second {ours}; there has to be one")
            tensors[ours] = change.to_ours(tensor)
            coverage.append(Used(name, ours, change.value, tensor.shape, str(tensor.dtype)))
        if not found:
            reason = table.reason(plain)
            if reason is None:
                unknown.append(name)
            coverage.append(Used(name, None, reason or "unknown", tensor.shape, str(tensor.dtype)))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"{path} has tensors that {family}'s files of BLIP-2 do not have: {', '.join(unknown[:5])}{more}")
    _split_qkv_bias(tensors, coverage)
    return tensors, coverage


def _modern(name: str) -> str:
    """BERT's files of 2018 call a norm's weight and bias gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _original(table: Table, stored: dict[str, StoredTensor], ours: str) -> StoredTensor | None:
    """The tensor of the file that makes `ours`."""
    for name, tensor in stored.items():
        for found, change in table.to_ours(_modern(name) if table is BERT else name):
            if found == ours:
                return change.to_ours(tensor)
    return None


def _tied(where: str, copy: StoredTensor, original: StoredTensor, must_equal: bool) -> str:
    if _equal(copy, original):
        return "tied to the word embeddings" if len(copy.shape) > 1 else "the same as the head's bias"
    if must_equal:
        raise UserError(f"{where} differs from {original.where}, to which it is tied in our model")
    return "untied and different there; ours is tied to the word embeddings"


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    ours, theirs = one.open(), other.open()
    starts = range(0, len(ours), _ROWS_AT_ONCE)
    return all(np.array_equal(ours[start : start + _ROWS_AT_ONCE], theirs[start : start + _ROWS_AT_ONCE]) for start in starts)


def _split_qkv_bias(tensors: dict[str, StoredTensor], coverage: list[Used]) -> None:
    """Biases of queries and values apart, where EVA's packed ones have nothing for the keys, as in all published weights.

    A key's bias changes no attention, but where some file has one it is kept, so that it can be given back.
    """
    if "vision.norm.weight" in tensors:  # CLIP has all three
        return
    packed = {name: match[1] for name in tensors if (match := _QKV_BIAS.fullmatch(name))}
    if any(tensors[name].shape[0] % 3 for name in packed):  # filling the model will name it
        return
    if any(np.any(third) for name in packed for third in [np.split(tensors[name].open(), 3)[1]]):
        return
    for name, prefix in packed.items():
        if f"{prefix}query_bias" in tensors or f"{prefix}value_bias" in tensors:
            raise UserError(f"{tensors[name].where}: there is a second bias of the same queries and values")
        tensor = tensors.pop(name)
        shape = (tensor.shape[0] // 3,)
        tensors[f"{prefix}query_bias"] = tensor.changed(shape, lambda array: np.split(array, 3)[0])
        tensors[f"{prefix}value_bias"] = tensor.changed(shape, lambda array: np.split(array, 3)[2])
        index = next(i for i, row in enumerate(coverage) if row.ours == name)
        row = coverage[index]
        coverage[index : index + 1] = [
            row._replace(ours=f"{prefix}query_bias", reason="first third; the keys' is zero"),
            row._replace(ours=f"{prefix}value_bias", reason="last third"),
        ]
