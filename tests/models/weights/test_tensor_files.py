"""Tensors of Hugging Face folders: PyTorch's pickles may make tensors and nothing else, damage is refused by name.

No PyTorch here: `torch_file` writes what torch.save does, and tests/parity/language has a file that PyTorch itself wrote.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from blip2x.errors import UserError
from blip2x.models.weights.tensor_files import open_tensors, read_json

REAL = Path(__file__).resolve().parents[2] / "parity" / "language"


class Storage:
    """Numbers that tensors look into."""

    def __init__(self, kind: str, array: np.ndarray):
        self.kind, self.array = kind, array


class View:
    """A tensor: part of a storage."""

    def __init__(self, storage: Storage, offset: int, size: tuple, stride: tuple, parameter: bool = False):
        self.words = (storage, offset, size, stride, False, OrderedDict())
        self.parameter = parameter

    def __reduce__(self):
        torch = sys.modules["torch._utils"]
        if self.parameter:
            return torch._rebuild_parameter, (View(*self.words[:4]), True, OrderedDict())
        return torch._rebuild_tensor_v2, self.words


@pytest.fixture
def torch_file(tmp_path, monkeypatch):
    """`torch_file(content)` -> a folder with content as torch.save writes it."""
    torch, utils = ModuleType("torch"), ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage", "BoolStorage", "QInt8Storage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, type(name, (), {"__module__": "torch._utils"}))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def write(content):
        storages, buffer = [], io.BytesIO()

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if not isinstance(value, Storage):
                    return None
                if value not in storages:
                    storages.append(value)
                number = storages.index(value)
                return ("storage", getattr(torch, value.kind), str(number), "cpu", value.array.size)

        Pickler(buffer, protocol=2).dump(content)
        with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", buffer.getvalue())
            for number, storage in enumerate(storages):
                archive.writestr(f"archive/data/{number}", storage.array.tobytes())
        return tmp_path

    return write


NUMBERS = np.arange(12, dtype="float32")


def test_views_parameters_and_types(torch_file):
    shared = Storage("FloatStorage", NUMBERS)
    rounded = (NUMBERS.view("u4") >> 16).astype("u2")  # bfloat16: the upper half
    tensors = open_tensors(
        torch_file(
            OrderedDict(
                plain=View(shared, 0, (3, 4), (4, 1)),
                transposed=View(shared, 0, (4, 3), (1, 4)),
                tail=View(shared, 10, (2,), (1,)),
                scalar=View(shared, 7, (), ()),
                empty=View(shared, 0, (0, 4), (4, 1)),
                parameter=View(shared, 0, (12,), (1,), parameter=True),
                half=View(Storage("HalfStorage", NUMBERS.astype("f2")), 0, (12,), (1,)),
                bfloat=View(Storage("BFloat16Storage", rounded), 0, (12,), (1,)),
                whole=View(Storage("LongStorage", np.array([1, -(2**40)])), 0, (2,), (1,)),
                flags=View(Storage("BoolStorage", np.array([True, False])), 0, (2,), (1,)),
            )
        )
    )
    expected = {"plain": NUMBERS.reshape(3, 4), "transposed": NUMBERS.reshape(3, 4).T, "tail": NUMBERS[10:]}
    expected |= {"scalar": np.float32(7), "empty": np.zeros((0, 4), "f4"), "whole": np.array([1, -(2**40)])}
    expected |= dict.fromkeys(["parameter", "half", "bfloat"], NUMBERS) | {"flags": np.array([True, False])}
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        found = tensors[name].read()
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype and tensors[name].shape == array.shape


class Planted:
    """What a malicious file does when it is unpickled."""

    def __init__(self, call, *words):
        self.recipe = (call, words)

    def __reduce__(self):
        return self.recipe


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        (lambda victim: Planted(os.system, f"touch {victim}"), r"refers to posix\.system, which is no tensor"),
        (lambda victim: Planted(eval, f"open({victim!r}, 'w')"), r"refers to \w+\.eval"),
        (lambda victim: Planted(getattr, OrderedDict, "fromkeys"), r"refers to \w+\.getattr"),
    ],
)
def test_planted_calls_are_refused_by_name_and_not_made(torch_file, tmp_path, planted, named):
    victim = tmp_path / "victim"
    folder = torch_file({"weight": View(Storage("FloatStorage", NUMBERS), 0, (12,), (1,)), "extra": planted(str(victim))})
    with pytest.raises(UserError, match=rf"pytorch_model\.bin {named}.* only load weights from people you trust"):
        open_tensors(folder)
    assert not victim.exists()


@pytest.mark.parametrize("content", [[1, 2], {"weight": 3}, {"model": {"nested": 1}}, None])
def test_other_content_is_refused(torch_file, content):
    with pytest.raises(UserError, match="holds something else than named tensors"):
        open_tensors(torch_file(content))


def test_type_that_is_not_known_is_refused_by_name(torch_file):
    with pytest.raises(UserError, match=r"refers to torch\.QInt8Storage"):
        open_tensors(torch_file({"x": View(Storage("QInt8Storage", NUMBERS.astype("i1")), 0, (12,), (1,))}))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(1, (12,), (1,)), (0, (3, 4), (5, 1)), (-1, (4,), (1,)), (11, (2,), (-1,)), (0, (-3,), (1,))],
)
def test_a_view_beyond_its_storage_is_refused_when_it_is_read(torch_file, offset, size, stride):
    tensors = open_tensors(torch_file({"x": View(Storage("FloatStorage", NUMBERS), offset, size, stride)}))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: archive/data/0 is shorter than its tensor"):
        tensors["x"].read()


def copy_real(folder: Path, name: str) -> Path:
    for file in (REAL / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_flipped_bit_in_a_torch_file_is_found_by_its_checksum(tmp_path):
    path = copy_real(tmp_path, "opt_bfloat16_torch") / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    content = bytearray(path.read_bytes())
    content[content.index(archive_bytes(path, info), info.header_offset) + 1] ^= 1
    path.write_bytes(content)
    tensors = open_tensors(tmp_path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .*data/0 cannot be read \(Bad CRC-32"):
        for tensor in tensors.values():
            tensor.read()


def archive_bytes(path: Path, info: zipfile.ZipInfo) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(info)


@pytest.mark.parametrize("name", ["opt_bfloat16_torch/pytorch_model.bin", "opt/model.safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 200, -10])
def test_truncated_files_are_refused_by_name(tmp_path, name, kept):
    folder, file = name.split("/")
    path = copy_real(tmp_path, folder) / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"{file} cannot be read as weights .* copy or download it again"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("position", range(0, 120, 7))
def test_damaged_pickle_ends_in_one_sentence_or_in_tensors(torch_file, position):
    folder = torch_file({"weight": View(Storage("FloatStorage", NUMBERS), 0, (3, 4), (4, 1))})
    with zipfile.ZipFile(folder / "pytorch_model.bin") as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    members["archive/data.pkl"][position] ^= 0x55
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, bytes(content))
    try:
        assert len(open_tensors(folder)) == 1
    except UserError as error:
        assert "pytorch_model.bin" in str(error)


def test_file_from_before_pytorch_1_6_is_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("something.txt", "else")
    with pytest.raises(UserError, match=r"is not a file that torch\.save of PyTorch 1\.6 or later has written"):
        open_tensors(tmp_path)


def test_no_weights_and_a_missing_shard_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no weights in .*model\.safetensors or pytorch_model\.bin"):
        open_tensors(tmp_path)
    copy_real(tmp_path, "opt_bfloat16_shards")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing: the index"):
        open_tensors(tmp_path)


def test_safetensors_go_before_torch_files_and_are_float32(tmp_path):
    save_file({"half": NUMBERS.astype("f2"), "whole": np.arange(3)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    tensors = open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["half"].read(), NUMBERS)
    assert (tensors["half"].read().dtype, tensors["whole"].read().dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\udcff"])
def test_damaged_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json .* copy or download it again"):
        read_json(tmp_path / "config.json")


def test_index_without_names_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}}))
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json has no weight_map"):
        open_tensors(tmp_path)
