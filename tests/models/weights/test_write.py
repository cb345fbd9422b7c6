"""What we write as safetensors, the format's own library reads; each tensor has its checksum."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from blip2x.errors import UserError
from blip2x.models.weights.stored import StoredTensor
from blip2x.models.weights.tensor_files import open_tensors
from blip2x.models.weights.write import write_safetensors

NUMBERS = np.arange(12).reshape(3, 4)
ARRAYS = {kind: NUMBERS.astype(kind) for kind in ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u1")}
ARRAYS |= {"bf16": (NUMBERS / 7).astype(ml_dtypes.bfloat16), "bool": NUMBERS % 2 == 0}
ARRAYS |= {"scalar": np.float32(7), "empty": np.empty((0, 4), "f4"), "empty bf16": np.empty((2, 0), ml_dtypes.bfloat16)}
ARRAYS |= {"transposed": NUMBERS.astype("f4").T, "a part": NUMBERS.astype("f4")[:, 1::2], "odd": np.ones(3, "i1")}


def stored(arrays: dict[str, np.ndarray]) -> dict[str, StoredTensor]:
    return {name: StoredTensor.of(name, np.asarray(array)) for name, array in arrays.items()}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, stored(ARRAYS), {"format": "pt", "made by": "a test"})
    return path


def test_every_type_and_shape_is_what_the_library_reads(file):
    found = load_file(file)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_it_comes_back_through_our_own_reader(file):
    found = open_tensors(file)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name].read(), array, err_msg=name)


def test_metadata_is_kept_beside_the_checksums(file):
    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt" and metadata["made by"] == "a test"
    assert json.loads(metadata["crc32"]).keys() == ARRAYS.keys()


@pytest.mark.parametrize("name", ["f4", "bf16", "odd", "transposed"])
def test_a_flipped_bit_is_found_and_the_tensor_named(file, name):
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + (start + end) // 2] ^= 1
    file.write_bytes(content)
    assert load_file(file).keys() == ARRAYS.keys()  # which does not see it
    for other, tensor in open_tensors(file).items():
        if other != name:
            np.testing.assert_array_equal(tensor.read(), ARRAYS[other])
        else:
            with pytest.raises(UserError, match=rf"model\.safetensors, tensor {name} is damaged: its checksum"):
                tensor.open()


def test_every_tensor_starts_at_a_whole_number_of_its_elements(file):
    """So that a mapped one can be read as it is."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, array in ARRAYS.items():
        assert (8 + length + header[name]["data_offsets"][0]) % array.dtype.itemsize == 0, name


def test_one_tensor_after_the_other_is_opened(tmp_path):
    held = []

    def opened(index):
        held.append(index)
        return np.full((2,), index, "f4")

    tensors = {str(i): StoredTensor(str(i), (2,), np.dtype("f4"), lambda i=i: opened(i)) for i in range(3)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert held == [0, 1, 2]  # each once


def test_a_type_that_the_format_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^z has numbers of type complex64, which safetensors does not write$"):
        write_safetensors(tmp_path / "x.safetensors", stored({"z": np.ones(2, "c8")}))
    assert not (tmp_path / "x.safetensors").exists()


def test_without_tensors_there_is_a_file_all_the_same(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {} and open_tensors(tmp_path / "x.safetensors") == {}
