"""Reading checkpoints: damage is refused by the file's name, names and shapes are strict, nothing is set unless all fits."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.freeze import freeze
from blip2x.models.weights.checkpoint import frozen_origins, is_below, load_checkpoint, read_manifest, split_state


class Model(nn.Layer):
    def __init__(self, width: int = 3):
        super().__init__()
        self.vision = nn.Linear(2, width)
        self.proj = nn.Linear(width, 2)


def names(model: nn.Layer) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of `Model` whose vision was frozen."""
    model = Model()
    freeze(model.vision)
    return save_checkpoint(tmp_path / "checkpoint", model, kind="k", step=1, frozen_origin={"vision": "weights/eva"})


@pytest.fixture
def whole(tmp_path):
    """A checkpoint of all of `Model`."""
    return save_checkpoint(tmp_path / "whole", Model(), kind="k", step=1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in a tensor: nothing but the hash can tell
    path.write_bytes(content)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: flip_a_bit(f / "model.safetensors"), r"checkpoint/model\.safetensors is damaged: its sha256"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-4]),
            r"model\.safetensors is d",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"checkpoint/model\.safetensors is missing from the checkpoint"),
        (lambda f: (f / "manifest.json").unlink(), r"no checkpoint at .*checkpoint: it has no manifest\.json"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1'), r"manifest\.json is damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json is damaged"),
        (lambda f: edit_manifest(f, frozen={}), r"manifest\.json is damaged"),
        (lambda f: edit_manifest(f, format=2), r"has format 2; this version of blip2x reads format 1"),
    ],
)
def test_damage_is_refused_by_name(folder, damage, sentence):
    damage(folder)
    model = Model()
    before = model.proj.weight.numpy().copy()
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(folder, model, allow_missing=[("vision.", "frozen")])
    np.testing.assert_array_equal(model.proj.weight.numpy(), before)


def test_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*absent: there is no such folder"):
        read_manifest(tmp_path / "absent")


def test_frozen_parts_are_missing_with_their_origin(folder):
    with pytest.raises(UserError, match=r"lacks tensors of the model \(left out because .* vision from weights/eva\): vision"):
        load_checkpoint(folder, Model())
    assert frozen_origins(folder) == {"vision": "weights/eva"}
    model = Model()
    report = load_checkpoint(folder, model, allow_missing=[("vision.", "its weights come from elsewhere")])
    assert set(report.loaded) == {"proj.weight", "proj.bias"}
    assert set(report.missing) == {"vision.weight", "vision.bias"}
    assert str(report) == f"2 tensors from {folder}; 2 not in it (its weights come from elsewhere)"


def test_names_are_strict_in_both_directions(whole):
    class More(Model):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(1, 1)

    with pytest.raises(UserError, match=r"lacks tensors of the model: extra\.bias, extra\.weight$"):
        load_checkpoint(whole, More())
    with pytest.raises(UserError, match=r"has tensors that the model lacks: vision\.bias, vision\.weight$"):
        load_checkpoint(whole, nn.Sequential(("proj", nn.Linear(3, 2))))
    report = load_checkpoint(whole, nn.Sequential(("proj", nn.Linear(3, 2))), drop=[("vision.", "not needed")])
    assert report.dropped == dict.fromkeys(["vision.weight", "vision.bias"], "not needed")


def test_a_part_is_filled_from_a_whole(whole):
    part = nn.Linear(2, 3)
    report = load_checkpoint(whole, part, prefix="vision.", drop=[("proj.", "another part")])
    assert set(report.loaded) == {"weight", "bias"}
    model = Model()
    load_checkpoint(whole, model)
    np.testing.assert_array_equal(part.weight.numpy(), model.vision.weight.numpy())


def test_many_names_are_cut_short(tmp_path):
    folder = save_checkpoint(tmp_path / "c", nn.Sequential(*(nn.Linear(1, 1) for _ in range(4))), kind="k", step=1)
    with pytest.raises(UserError, match=r"0\.bias, 0\.weight, 1\.bias, 1\.weight, 2\.bias and 3 more$"):
        load_checkpoint(folder, nn.Layer())


def test_shapes_and_types_are_strict_and_nothing_is_set(whole, tmp_path):
    model = Model(width=4)
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"vision\.weight is float32 \[2, 3\] in the file, but float32 \[2, 4\] in the model"):
        load_checkpoint(whole, model)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), before[name])
    double = save_checkpoint(tmp_path / "double", Model().to(dtype="float64"), kind="k", step=1)
    with pytest.raises(UserError, match=r"is float64 .* in the file, but float32"):
        load_checkpoint(double, Model())


def test_a_tensor_may_be_adapted_to_another_shape(whole):
    model = Model(width=4)
    adapt = dict.fromkeys(names(model), lambda array, wanted: np.resize(array, wanted))
    load_checkpoint(whole, model, adapt=adapt)
    reference = Model()
    load_checkpoint(whole, reference, adapt=adapt)  # of the right shape already
    np.testing.assert_array_equal(model.vision.weight.numpy(), np.resize(reference.vision.weight.numpy(), (2, 4)))


def test_split_of_parameters_and_buffers():
    model = Model()
    model.register_buffer("count", paddle.zeros([1]))
    model.register_buffer("scratch", paddle.zeros([1]), persistable=False)
    model.vision.register_buffer("mean", paddle.zeros([1]))
    model.vision_proj = nn.Linear(1, 1)  # not below "vision"
    model.shared = model.proj
    freeze(model.vision)
    kept, frozen = split_state(model)
    assert set(kept) == {"proj.weight", "proj.bias", "vision_proj.weight", "vision_proj.bias", "count"}
    assert set(frozen) == {"vision.weight", "vision.bias", "vision.mean"}


@pytest.mark.parametrize(
    ("name", "parts", "below"),
    [("vision.x", ["vision"], True), ("vision", ["vision"], True), ("vision_proj.x", ["vision"], False), ("x", [""], True)],
)
def test_is_below(name, parts, below):
    assert is_below(name, parts) == below
