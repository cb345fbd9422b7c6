"""Pickles of PyTorch and Paddle may make tensors and nothing else; damage is refused by name.

No PyTorch here: the fixture `torch` writes what torch.save does, and tests/parity has files that PyTorch itself wrote.
"""

from __future__ import annotations

import builtins
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from blip2x.errors import UserError
from blip2x.models.weights import pickles
from blip2x.models.weights.pickles import open_paddle, open_torch
from blip2x.models.weights.tensor_files import open_tensors

PARITY = Path(__file__).resolve().parents[2] / "parity"
NUMBERS = np.arange(12, dtype="f4")
LARGE = np.arange(40_000, dtype="f4").reshape(200, 200)  # more than pickle puts into a frame


def bytes_of(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), dtype="u1")


# PyTorch


def test_views_parameters_and_types(torch, tmp_path):
    shared = torch.storage("Float", NUMBERS)
    content = OrderedDict(
        plain=torch.view(shared, 0, (3, 4), (4, 1)),
        transposed=torch.view(shared, 0, (4, 3), (1, 4)),
        tail=torch.view(shared, 10, (2,), (1,)),
        scalar=torch.view(shared, 7, (), ()),
        empty=torch.view(shared, 0, (0, 4), (4, 1)),
        parameter=torch.view(shared, 0, (12,), (1,), parameter=True),
        half=torch.tensor(NUMBERS.astype("f2")),
        bfloat=torch.view(torch.storage("BFloat16", NUMBERS.astype(ml_dtypes.bfloat16)), 0, (12,), (1,)),
        double=torch.tensor(NUMBERS.astype("f8")),
        whole=torch.tensor(np.array([1, -(2**40)])),
        small=torch.tensor(np.array([[1], [-5]], dtype="i1")),
        flags=torch.view(torch.storage("Bool", np.array([True, False])), 0, (2,), (1,)),
    )
    expected = {"plain": NUMBERS.reshape(3, 4), "transposed": NUMBERS.reshape(3, 4).T, "tail": NUMBERS[10:]}
    expected |= {"scalar": np.float32(7), "empty": np.zeros((0, 4), "f4"), "parameter": NUMBERS}
    expected |= {"half": NUMBERS.astype("f2"), "bfloat": NUMBERS.astype(ml_dtypes.bfloat16), "double": NUMBERS.astype("f8")}
    expected |= {"whole": np.array([1, -(2**40)]), "small": np.array([[1], [-5]], "i1"), "flags": np.array([True, False])}
    path = torch.save(content, tmp_path / "weights.bin")
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # the second by somebody who packed it again
        tensors = open_torch(torch.save(content, path, compression))
        assert tensors.keys() == expected.keys()
        for name, array in expected.items():
            found = tensors[name].read()
            np.testing.assert_array_equal(found, array, err_msg=name)
            assert found.dtype == tensors[name].dtype == array.dtype and found.shape == tensors[name].shape == array.shape
            assert tensors[name].where == f"{path}, tensor {name}"


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(1, (12,), (1,)), (0, (3, 4), (5, 1)), (-1, (4,), (1,)), (11, (2,), (-1,)), (0, (-3,), (1,)), (-1, (0,), (1,))],
)
def test_a_view_beyond_its_storage_is_refused_when_it_is_read(torch, tmp_path, offset, size, stride):
    content = {"x": torch.view(torch.storage("Float", NUMBERS), offset, size, stride)}
    tensors = open_torch(torch.save(content, tmp_path / "weights.bin"))
    with pytest.raises(UserError, match=r"tensor x: .*weights\.bin: archive/data/0 is shorter than its tensor"):
        tensors["x"].read()


def test_a_type_that_is_not_known_is_refused_by_name(torch, tmp_path):
    content = {"x": torch.view(torch.storage("QInt8", NUMBERS.astype("i1")), 0, (12,), (1,))}
    with pytest.raises(UserError, match=r"refers to torch\.QInt8Storage"):
        open_torch(torch.save(content, tmp_path / "weights.bin"))


def test_what_stands_beside_the_tensors_is_kept_and_a_mapping_is_opened(torch, tmp_path):
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-4}]}
    content = {"model": {"x": torch.tensor(NUMBERS)}, "optimizer": optimizer, "epoch": 7}
    found = open_torch(torch.save(content, tmp_path / "checkpoint.pth"))
    np.testing.assert_array_equal(found["model"]["x"].read(), NUMBERS)
    assert found["epoch"] == 7 and found["optimizer"]["param_groups"] == [{"lr": 1e-4}]


@pytest.mark.parametrize("content", [[1, 2], None, "text", {1: "a"}])
def test_content_without_names_is_refused(torch, tmp_path, content):
    with pytest.raises(UserError, match=r"weights\.bin holds a \w+, not names with tensors"):
        open_torch(torch.save(content, tmp_path / "weights.bin"))


def test_a_flipped_bit_is_found_by_the_archives_checksum(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes((PARITY / "language/opt_bfloat16_torch/pytorch_model.bin").read_bytes())
    whole = {name: tensor.read() for name, tensor in open_torch(path).items()}
    content = bytearray(path.read_bytes())
    name = "model.decoder.layers.1.fc1.weight"
    content[content.index(bytes_of(whole[name]).tobytes()) + 3] ^= 4
    path.write_bytes(content)
    for tensor in (tensors := open_torch(path)):
        if tensor != name:
            np.testing.assert_array_equal(tensors[tensor].read(), whole[tensor])
    with pytest.raises(UserError, match=rf"tensor {name}: .*weights\.bin: \w+/data/\d+ is damaged: its checksum"):
        tensors[name].open()


@pytest.mark.parametrize("place", ["in the middle", "first of the compressed bytes", "method in the archive's list"])
def test_a_flipped_bit_in_a_compressed_archive_is_found_too(torch, tmp_path, place):
    """By the checksum, by zlib, and by zipfile."""
    path = torch.save({"x": torch.tensor(LARGE)}, tmp_path / "weights.bin", zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    name = b"archive/data/0"
    first, listed = content.index(name) + len(name), content.rindex(name) - 46 + 10
    content[{"in the middle": len(content) // 2, "first of the compressed bytes": first}.get(place, listed)] ^= 0b10
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tensor x: .*weights\.bin: archive/data/0 cannot be read .* copy or download"):
        open_torch(path)["x"].read()


@pytest.mark.parametrize("position", range(0, 120, 7))
def test_a_damaged_description_ends_in_one_sentence_or_in_tensors(torch, tmp_path, position):
    path = torch.save({"weight": torch.view(torch.storage("Float", NUMBERS), 0, (3, 4), (4, 1))}, tmp_path / "weights.bin")
    with zipfile.ZipFile(path) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    members["archive/data.pkl"][position] ^= 0x55
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(content))
    try:
        tensors = open_tensors(path)
        assert len(tensors) == 1
        next(iter(tensors.values())).read()
    except UserError as error:
        assert "weights.bin" in str(error)


def test_a_file_from_before_pytorch_1_6_is_told_apart(tmp_path):
    path = tmp_path / "weights.bin"
    for content in (pickle.dumps({"x": 1}), b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.bin is not a file that torch\.save of PyTorch 1\.6 or later has wri"):
            open_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("something.txt", "else")
    with pytest.raises(UserError, match=r"is not a file that torch\.save of PyTorch 1\.6 or later has written$"):
        open_torch(path)


# Paddle

PADDLE = {
    "matrix": paddle.to_tensor(NUMBERS.reshape(3, 4)),
    "large": paddle.to_tensor(LARGE),
    "bfloat": paddle.to_tensor(NUMBERS).astype("bfloat16"),
    "large_bfloat": paddle.to_tensor(LARGE).astype("bfloat16"),
    "half": paddle.to_tensor(NUMBERS).astype("float16"),
    "whole": paddle.to_tensor(np.array([1, -(2**40)])),
    "scalar": paddle.to_tensor(7.0),
    "empty": paddle.zeros([0, 4]),
}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_paddle_saves_comes_back_in_its_type(tmp_path, protocol):
    saved = {name: tensor for name, tensor in PADDLE.items() if name != "empty" or protocol > 2}
    paddle.save(saved, str(tmp_path / "a.pdparams"), protocol=protocol)
    found = open_paddle(tmp_path / "a.pdparams")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        array = tensor.numpy()
        if array.dtype == np.uint16:  # so Paddle gives and writes bfloat16
            array = array.view(ml_dtypes.bfloat16)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].read(), array, err_msg=name)


def test_a_layers_state_is_read_without_paddles_own_names(tmp_path):
    layer = paddle.nn.Linear(3, 2)
    paddle.save(layer.state_dict(), str(tmp_path / "a.pdparams"))
    assert b"StructuredToParameterName@@" in (tmp_path / "a.pdparams").read_bytes()
    found = open_paddle(tmp_path / "a.pdparams")
    assert found.keys() == {"weight", "bias"}
    np.testing.assert_array_equal(found["weight"].read(), layer.weight.numpy())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("array", [np.asfortranarray(NUMBERS.reshape(3, 4)), np.asfortranarray(LARGE), LARGE.astype(">f4")])
def test_another_order_of_axes_or_bytes(tmp_path, protocol, array):
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"x": array}, protocol=protocol))
    found = open_paddle(tmp_path / "a.pdparams")["x"]
    assert found.shape == array.shape
    np.testing.assert_array_equal(found.read(), array)


def test_large_numbers_are_not_read_with_the_pickle(tmp_path):
    path = tmp_path / "a.pdparams"
    paddle.save(PADDLE, str(path))
    counts = []

    class Counted(io.BytesIO):
        def read(self, size=-1):
            counts.append(size)
            return super().read(size)

    pickles._PaddleUnpickler(Counted(path.read_bytes()), path).load()
    assert min(counts) >= 0 and sum(counts) < 4000 < path.stat().st_size


@pytest.mark.parametrize("name", ["large", "large_bfloat"])
def test_a_truncated_file_names_the_tensor_that_is_cut_off(tmp_path, name):
    path = tmp_path / "a.pdparams"
    paddle.save(PADDLE, str(path))
    array = PADDLE[name].numpy()
    content = path.read_bytes()
    path.write_bytes(content[: content.index(array.tobytes()) + array.nbytes // 2])
    with pytest.raises(UserError, match=rf"a\.pdparams, tensor {name}: the file is cut off in this tensor; copy or download"):
        open_tensors(path)


@pytest.mark.parametrize("kept", [0, 1, 20, 150, -3])
def test_a_file_truncated_elsewhere_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "a.pdparams"
    paddle.save(PADDLE, str(path))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a\.pdparams cannot be read as weights .* copy or download it again"):
        open_tensors(path)


@pytest.mark.parametrize("position", range(3, 600, 29))
def test_a_damaged_pdparams_ends_in_one_sentence_or_in_tensors(tmp_path, position):
    path = tmp_path / "a.pdparams"
    paddle.save({"first": paddle.ones([3, 4]), "second": paddle.ones([2]).astype("bfloat16")}, str(path))
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x55
    path.write_bytes(content)
    try:
        for tensor in open_tensors(path).values():
            tensor.read()
    except UserError as error:
        assert "a.pdparams" in str(error)


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([1 + 2j]), np.array([(1, 2)], dtype="i4,i4")])
def test_arrays_that_hold_no_plain_numbers_are_refused(tmp_path, array):
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"x": array}, protocol=4))
    with pytest.raises(UserError, match=r"a\.pdparams, tensor x: its description is damaged"):
        open_paddle(tmp_path / "a.pdparams")


def test_an_array_of_objects_is_refused(tmp_path):
    (tmp_path / "a.pdparams").write_bytes(pickle.dumps({"x": np.array([None])}, protocol=4))
    with pytest.raises(UserError, match=r"a\.pdparams"):
        open_tensors(tmp_path / "a.pdparams")


# both


class Planted:
    """What a malicious file does when it is unpickled."""

    def __init__(self, call, *words):
        self.recipe = (call, words)

    def __reduce__(self):
        return self.recipe


CALLS = {
    r"posix\.system": lambda victim: Planted(os.system, f"touch {victim}"),
    r"builtins\.eval": lambda victim: Planted(builtins.eval, f"open({victim!r}, 'w')"),
    r"builtins\.getattr": lambda victim: Planted(builtins.getattr, OrderedDict, "fromkeys"),
    r"numpy\.load": lambda victim: Planted(np.load, victim),
}


@pytest.mark.parametrize("named", CALLS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pdparams"])
def test_planted_calls_are_refused_by_name_and_not_made(torch, tmp_path, suffix, protocol, named):
    victim, path = tmp_path / "victim", tmp_path / f"weights{suffix}"
    planted = CALLS[named](str(victim))
    if suffix == ".pdparams":
        path.write_bytes(pickle.dumps({"weight": LARGE, "extra": planted}, protocol=protocol))
    else:
        torch.save({"weight": torch.tensor(NUMBERS), "extra": planted}, path)
    module = named.replace("builtins", r"(builtins|__builtin__)")
    sentence = rf"weights\{suffix} refers to {module}, which is no tensor; only load weights from people you trust"
    with pytest.raises(UserError, match=sentence):
        open_tensors(path)
    assert not victim.exists()


def test_the_planted_calls_are_made_by_pickle_itself(tmp_path):
    """So the test before this one could fail."""
    for name, plant in list(CALLS.items())[:2]:
        victim = tmp_path / name[-4:]
        pickle.loads(pickle.dumps(plant(str(victim))))
        assert victim.exists()


@pytest.mark.parametrize("suffix", [".bin", ".pdparams"])
def test_a_persistent_reference_of_another_kind_is_refused(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    text = b"\x80\x02}X\x01\x00\x00\x00xX\x03\x00\x00\x00odeQs."  # {"x": persistent "ode"}
    if suffix == ".bin":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", text)
    else:
        path.write_bytes(text)
    with pytest.raises(UserError, match=rf"weights\{suffix}"):
        open_tensors(path)
