"""The manifest of a checkpoint: what it lists is there as it was, else the checkpoint is refused by the file's name."""

from __future__ import annotations

import hashlib
import json

import pytest
from paddle import nn

from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.freeze import freeze
from blip2x.models.weights.manifest import frozen_origins, read_manifest, sha256


class Tokenizer:
    def save(self, folder):
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose vision was frozen."""
    model = nn.LayerDict({"vision": nn.Linear(2, 3), "language_proj": nn.Linear(3, 2)})
    freeze(model["vision"])
    origin = {"vision": "weights/eva"}
    tokenizers = {"qformer": Tokenizer()}
    return save_checkpoint(tmp_path / "checkpoint", model, kind="k", step=1, frozen_origin=origin, tokenizers=tokenizers)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path, kept):
    path.write_bytes(path.read_bytes()[:kept])


def test_a_whole_checkpoint_is_read(folder):
    manifest = read_manifest(folder)
    assert (manifest["kind"], manifest["step"]) == ("k", 1)
    assert manifest["files"].keys() == {"model.safetensors", "tokenizers/qformer/tokenizer.json"}
    assert manifest["tensors"] == {
        "language_proj.weight": {"shape": [3, 2], "dtype": "float32"},
        "language_proj.bias": {"shape": [2], "dtype": "float32"},
    }
    assert frozen_origins(folder) == {"vision": "weights/eva"}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: cut(f / "model.safetensors", -4), r"checkpoint/model\.safetensors is damaged: \d+ bytes, recorded are \d+"),
        (lambda f: (f / "model.safetensors").unlink(), r"checkpoint/model\.safetensors is missing from the checkpoint"),
        (lambda f: (f / "tokenizers/qformer/tokenizer.json").write_text("[]"), r"tokenizer\.json is damaged: its sha256"),
        (lambda f: (f / "tokenizers/qformer/tokenizer.json").unlink(), r"tokenizer\.json is missing from the checkpoint"),
        (lambda f: (f / "manifest.json").unlink(), r"no checkpoint at .*checkpoint: it has no manifest\.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1'), r"manifest\.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json is damaged"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json is damaged"),
        (lambda f: edit_manifest(f, frozen={}), r"manifest\.json is damaged"),
        (lambda f: edit_manifest(f, files=[]), r"manifest\.json is damaged"),
        (lambda f: edit_manifest(f, format=2), r"has format 2; this version of blip2x reads format 1"),
    ],
)
def test_damage_is_refused_by_name(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError, match=sentence):
        read_manifest(folder)


def test_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*absent: there is no such folder"):
        read_manifest(tmp_path / "absent")


def test_hash_of_a_file_larger_than_a_block(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
