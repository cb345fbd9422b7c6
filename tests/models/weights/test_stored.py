"""Tensors in files: known at once, read when asked for, and checked then."""

from __future__ import annotations

import zlib

import ml_dtypes
import numpy as np
import pytest

from blip2x.errors import UserError
from blip2x.models.weights.stored import StoredTensor, is_real, mapped, read_json, require_finite

NUMBERS = np.arange(12, dtype="f4")


@pytest.fixture
def file(tmp_path):
    """`NUMBERS` behind five other bytes."""
    path = tmp_path / "numbers"
    path.write_bytes(b"other" + NUMBERS.tobytes())
    return path


def numbers(path, shape=(3, 4), offset=5, crc=None):
    return mapped(path, f"{path}, tensor x", offset=offset, shape=shape, dtype=np.dtype("<f4"), crc=crc)


def test_numbers_are_where_the_offset_says(file):
    tensor = numbers(file)
    assert (tensor.shape, tensor.dtype) == ((3, 4), np.float32)
    np.testing.assert_array_equal(tensor.read(), NUMBERS.reshape(3, 4))
    np.testing.assert_array_equal(numbers(file, (), 5 + 7 * 4).read(), np.float32(7))
    np.testing.assert_array_equal(numbers(file, (2, 0)).read(), np.empty((2, 0)))


def test_what_is_read_is_a_copy_of_its_own_and_what_is_opened_cannot_be_changed(file):
    tensor = numbers(file)
    copy = tensor.read()
    copy[:] = -1
    np.testing.assert_array_equal(tensor.read(), NUMBERS.reshape(3, 4))
    with pytest.raises(ValueError, match="read-only"):
        tensor.open()[0] = 1
    array = np.ones(2)
    StoredTensor.of("here", array).read()[:] = 0
    assert array.all()


def test_a_file_that_ends_too_early_is_told_when_the_tensor_is_opened(file):
    tensor = numbers(file, (4, 4))
    with pytest.raises(UserError, match=r"numbers, tensor x: the file is cut off in this tensor; copy or download it again$"):
        tensor.open()


def test_the_checksum_is_compared(file):
    right = zlib.crc32(NUMBERS.tobytes())
    np.testing.assert_array_equal(numbers(file, crc=right).read(), NUMBERS.reshape(3, 4))
    with pytest.raises(UserError, match=r"numbers, tensor x is damaged: its checksum is not the recorded one"):
        numbers(file, crc=right ^ 1).open()


def test_a_change_is_made_when_the_tensor_is_opened():
    calls = []

    def transposed(array):
        calls.append(array.shape)
        return array.T

    tensor = StoredTensor.of("here", NUMBERS.reshape(3, 4)).changed((4, 3), transposed)
    assert tensor.shape == (4, 3) and tensor.where == "here" and not calls
    np.testing.assert_array_equal(tensor.read(), NUMBERS.reshape(3, 4).T)
    assert calls == [(3, 4)]


def test_which_types_are_real():
    assert all(is_real(np.dtype(kind)) for kind in ("f2", "f4", "f8", ml_dtypes.bfloat16))
    assert not any(is_real(np.dtype(kind)) for kind in ("i8", "u1", "?"))


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ml_dtypes.bfloat16])
@pytest.mark.parametrize("numbers", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf], [1, np.nan, 2]])
def test_numbers_that_are_no_weights_are_refused(kind, numbers):
    with pytest.raises(UserError, match=r"^here holds numbers that are no weights \(nan, infinite or above 1e\+30\)"):
        require_finite(np.array(numbers, dtype=kind), "here")


def test_a_flipped_exponent_bit_is_seen_and_large_weights_are_none():
    array = np.full(1000, 0.02, dtype="f4")
    require_finite(array, "here")
    require_finite(np.full(1000, 6e4, dtype="f2"), "here")  # whose sum is more than half precision can say
    array.view("u4")[500] ^= 1 << 30
    with pytest.raises(UserError, match="no weights"):
        require_finite(array, "here")


def test_whole_numbers_and_empty_tensors_are_weights():
    for array in (np.array([2**62]), np.array([True]), np.empty((0, 3), "f4")):
        require_finite(array, "here")


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\udcff"])
def test_damaged_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json .* copy or download it again"):
        read_json(tmp_path / "config.json")
