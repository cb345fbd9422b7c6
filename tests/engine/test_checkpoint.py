"""Checkpoints hold what was trained, and there is either a whole one of a name or none."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file

from blip2x.engine import checkpoint
from blip2x.engine.checkpoint import save_checkpoint, whole_folder, write_checkpoint
from blip2x.errors import UserError
from blip2x.models.freeze import freeze
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.models.weights.manifest import read_manifest, sha256
from blip2x.models.weights.stored import StoredTensor


class Model(nn.Layer):
    """A frozen part, a trained part with a buffer, a buffer that is worked out anew, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1D(3))
        self.embedding = nn.Embedding(4, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 4)
        self.head.tied = self.embedding.weight
        self.register_buffer("mean", paddle.zeros([3]))
        self.register_buffer("positions", paddle.arange(4), persistable=False)
        freeze(self.vision)


ORIGIN = {"vision": "weights/eva"}
TRAINED = {"embedding.weight", "norm.weight", "norm.bias", "head.weight", "head.bias", "mean"}


def save(folder: Path, model: nn.Layer | None = None, **changes) -> Path:
    return save_checkpoint(folder, model or Model(), **{"kind": "stage1", "step": 5, "frozen_origin": ORIGIN, **changes})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_trained_is_written_once_and_frozen_parts_are_left_out_with_their_origin(tmp_path):
    model = Model()
    folder = save(tmp_path / "new" / "checkpoint", model, extra={"temperature": 0.07})
    arrays = load_file(folder / "model.safetensors")
    assert arrays.keys() == TRAINED  # the tied matrix once, nothing of vision, no positions
    np.testing.assert_array_equal(arrays["embedding.weight"], model.embedding.weight.numpy())

    manifest = read_manifest(folder)
    assert (manifest["kind"], manifest["step"], manifest["extra"]) == ("stage1", 5, {"temperature": 0.07})
    assert manifest["tensors"]["embedding.weight"] == {"shape": [4, 3], "dtype": "float32"}
    assert manifest["frozen"]["origin"] == ORIGIN
    assert set(manifest["frozen"]["names"]) == {f"vision.{name}" for name in model.vision.state_dict()}
    assert manifest["files"]["model.safetensors"]["sha256"] == sha256(folder / "model.safetensors")


def test_frozen_weights_without_origin_would_be_lost(tmp_path):
    with pytest.raises(UserError, match=r"^vision\.0\.weight is frozen, .* \(6 tensors\): give that part weights"):
        save(tmp_path / "checkpoint", frozen_origin={"visio": "x"})
    assert not list(tmp_path.iterdir())


def test_tokenizers_are_listed_with_their_hashes(tmp_path):
    class Tokenizer:
        def save(self, folder):
            folder.mkdir(parents=True)
            (folder / "tokenizer.json").write_text("{}")

    folder = save(tmp_path / "checkpoint", tokenizers={"qformer": Tokenizer()})
    assert read_manifest(folder)["files"].keys() == {"model.safetensors", "tokenizers/qformer/tokenizer.json"}
    (folder / "tokenizers" / "qformer" / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        read_manifest(folder)


def test_a_newer_checkpoint_replaces_the_older_and_nothing_else_stays(tmp_path):
    save(tmp_path / "checkpoint", step=1)
    (tmp_path / "checkpoint" / "stray.txt").write_text("of the older one")
    folder = save(tmp_path / "checkpoint", step=2)
    assert read_manifest(folder)["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert content(folder).keys() == {"manifest.json", "model.safetensors"}


@pytest.mark.parametrize("moment", ["write_safetensors", "sha256", "_sync", "_put_in_place"])
def test_killed_while_saving_the_older_checkpoint_is_whole_and_the_next_one_works(tmp_path, monkeypatch, moment):
    folder = save(tmp_path / "checkpoint", step=1)
    before = content(folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, moment, killed)
        save(folder, step=2)
    assert content(folder) == before
    save(folder, step=3)
    assert read_manifest(folder)["step"] == 3 and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("moment", ["sha256", "_sync"])
def test_killed_before_it_is_on_the_disk_the_first_checkpoint_is_none(tmp_path, monkeypatch, moment):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, moment, killed)
        save(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="no such folder"):
        read_manifest(tmp_path / "checkpoint")
    if moment == "sha256":  # before the manifest, which is the last file
        with pytest.raises(UserError, match=r"no manifest\.json"):
            read_manifest(tmp_path / ".checkpoint.partial")


def test_nothing_stays_of_one_that_failed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="no space left"):
        save(tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_it_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    synced, put_in_place = [], checkpoint._put_in_place
    monkeypatch.setattr(checkpoint, "_sync", synced.append)

    def check(partial, folder):
        files = {path for path in partial.rglob("*") if path.is_file()}
        assert {path.name for path in files} == {"manifest.json", "model.safetensors"} and files <= set(synced)
        assert synced[-1] == partial
        put_in_place(partial, folder)

    monkeypatch.setattr(checkpoint, "_put_in_place", check)
    save(tmp_path / "checkpoint")
    assert read_manifest(tmp_path / "checkpoint")["step"] == 5


def test_tensors_are_written_one_after_the_other_in_their_type(tmp_path):
    """As a converted checkpoint is, which is larger than memory."""
    opened = []

    def tensor(name: str, array: np.ndarray) -> StoredTensor:
        return StoredTensor(name, array.shape, array.dtype, lambda: opened.append(name) or array)

    arrays = {"vision.a": np.arange(6, dtype="f2").reshape(2, 3), "language.b": np.arange(3).astype(ml_dtypes.bfloat16)}
    frozen = {"names": ["qformer.c"], "origin": {"qformer": "x"}}
    tensors = {name: tensor(name, array) for name, array in arrays.items()}
    folder = write_checkpoint(tmp_path / "c", tensors, kind="convert", step=0, extra={"a": 1}, tokenizers={}, frozen=frozen)
    assert sorted(opened) == sorted(arrays)  # each once
    manifest = read_manifest(folder)
    assert (manifest["kind"], manifest["extra"], manifest["frozen"]) == ("convert", {"a": 1}, frozen)
    assert {name: entry["dtype"] for name, entry in manifest["tensors"].items()} == {
        "vision.a": "float16",
        "language.b": "bfloat16",
    }
    for name, array in load_file(folder / "model.safetensors").items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])


def test_a_folder_that_cannot_be_filled_leaves_the_older_one(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/old").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "c") as partial:
        (partial / "new").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "c/old").read_text() == "old" and not (tmp_path / "c/new").exists()
    with whole_folder(tmp_path / "c") as partial:
        assert not list(partial.iterdir())  # nothing of the attempt before
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["new"]


def test_full_disk_is_one_sentence_before_anything_is_written(tmp_path, monkeypatch):
    folder = save(tmp_path / "checkpoint", step=1)
    before = content(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2**20))
    with pytest.raises(UserError, match=r"checkpoint: 1 MiB free on its disk, 16 MiB are needed"):
        save(folder, step=2)
    assert content(tmp_path) == before


def test_model_comes_back_bit_for_bit(tmp_path):
    saved, fresh = Model(), Model()
    saved.mean.set_value(paddle.to_tensor([0.1, 1e-30, 3.0]))
    folder = save(tmp_path / "checkpoint", saved)
    load_checkpoint(folder, fresh, allow_missing=[("vision.", "frozen")])
    after, expected = fresh.state_dict(), saved.state_dict()
    for name in TRAINED:
        np.testing.assert_array_equal(after[name].numpy(), expected[name].numpy(), err_msg=name)
    assert fresh.head.tied is fresh.embedding.weight
