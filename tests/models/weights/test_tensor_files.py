"""Files and folders of tensors by name: which files count, what they may hold, and what is said of damage."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from blip2x.errors import UserError
from blip2x.models.weights.tensor_files import open_tensors

REAL = Path(__file__).resolve().parents[2] / "parity" / "language"
NUMBERS = np.arange(12, dtype="f4")


def copy_real(folder: Path, name: str) -> Path:
    for file in (REAL / name).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_tensors_come_in_their_type_whatever_the_format(tmp_path):
    arrays = {"half": NUMBERS.astype("f2"), "bfloat": NUMBERS.astype(ml_dtypes.bfloat16), "whole": np.arange(3), "f": NUMBERS}
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = {name: paddle.to_tensor(array) for name, array in arrays.items() if name != "bfloat"}
    tensors["bfloat"] = paddle.to_tensor(NUMBERS).astype("bfloat16")
    paddle.save(tensors, str(tmp_path / "model_state.pdparams"))
    for file in ("model.safetensors", "model_state.pdparams"):
        found = open_tensors(tmp_path / file)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == found[name].read().dtype == array.dtype and found[name].shape == array.shape
            np.testing.assert_array_equal(found[name].read(), array)
            assert found[name].where == f"{tmp_path / file}, tensor {name}"


def test_of_several_files_in_a_folder_safetensors_go_first_and_pdparams_last(tmp_path):
    paddle.save({"x": paddle.to_tensor(NUMBERS)}, str(tmp_path / "model_state.pdparams"))
    assert open_tensors(tmp_path).keys() == {"x"}
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not a file that torch\.save"):
        open_tensors(tmp_path)
    save_file({"y": NUMBERS}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).keys() == {"y"}


def test_shards_are_one(tmp_path):
    shards = open_tensors(REAL / "opt_bfloat16_shards")
    whole = open_tensors(REAL / "opt_bfloat16_torch")
    assert shards.keys() == whole.keys() - {"lm_head.weight"}
    for name, tensor in shards.items():
        np.testing.assert_array_equal(tensor.read(), whole[name].read(), err_msg=name)


@pytest.mark.parametrize("around", ["model", "state_dict"])
def test_a_training_checkpoint_s_model_is_taken_from_among_the_rest(torch, tmp_path, around):
    content = {
        around: {"x": torch.tensor(NUMBERS)},
        "optimizer": {"state": {0: {"step": 3}}},
        "config": {"lr": "1"},
        "epoch": 7,
    }
    found = open_tensors(torch.save(content, tmp_path / "checkpoint.pth"))
    assert found.keys() == {"x"}
    np.testing.assert_array_equal(found["x"].read(), NUMBERS)


@pytest.mark.parametrize("content", [{"weight": 3}, {"model": {"nested": 1}}, {"weight": [1.0, 2.0]}, {"epoch": {"lr": 1}}])
def test_other_content_is_refused_by_its_name(torch, tmp_path, content):
    name = "nested" if "model" in content else next(iter(content))
    with pytest.raises(UserError, match=rf"pytorch_model\.bin holds something else than named tensors: {name}$"):
        open_tensors(torch.save(content, tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize("name", ["opt_bfloat16_torch/pytorch_model.bin", "opt/model.safetensors"])
@pytest.mark.parametrize("kept", [0, 3, 200])
def test_files_that_end_in_what_describes_the_tensors_are_refused_by_name(tmp_path, name, kept):
    folder, file = name.split("/")
    path = copy_real(tmp_path, folder) / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"{file} .*(copy or download it again|or it is cut off)$"):
        open_tensors(tmp_path)


def test_a_safetensors_file_that_ends_in_a_tensor_names_it_when_it_is_opened(tmp_path):
    path = copy_real(tmp_path, "opt") / "model.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"][1])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"model\.safetensors, tensor {last}: the file is cut off in or before this tensor"):
        open_tensors(tmp_path)


def test_a_torch_file_that_ends_early_is_refused_by_name(tmp_path):
    path = copy_real(tmp_path, "opt_bfloat16_torch") / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-10])  # in the archive's directory
    with pytest.raises(UserError, match=r"pytorch_model\.bin .* or it is cut off$"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("position", range(8, 400, 37))
def test_a_damaged_header_ends_in_one_sentence_or_in_tensors(tmp_path, position):
    path = copy_real(tmp_path, "opt") / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 0x15
    path.write_bytes(content)
    try:
        for tensor in open_tensors(tmp_path).values():
            tensor.read()
    except UserError as error:
        assert "model.safetensors" in str(error)


def test_a_header_that_contradicts_itself_is_refused(tmp_path):
    save_file({"x": NUMBERS, "y": NUMBERS}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content.replace(b'"shape":[12]', b'"shape":[13]', 1))
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as weights .* copy or download it again"):
        open_tensors(tmp_path)


def test_a_type_that_is_not_read_is_named(tmp_path):
    save_file({"x": NUMBERS.astype("u2")}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor x has numbers of type U16, which blip2x does not read$"):
        open_tensors(tmp_path)


def test_no_weights_and_a_missing_shard_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no weights in .*model\.safetensors or pytorch_model\.bin.*model_state\.pdparams"):
        open_tensors(tmp_path)
    copy_real(tmp_path, "opt_bfloat16_shards")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing: the index"):
        open_tensors(tmp_path)


def test_a_name_in_two_shards_is_refused(tmp_path):
    copy_real(tmp_path, "opt_bfloat16_shards")
    first, second = (tmp_path / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors holds \S+, which another file of .* has as well"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"])
def test_a_damaged_index_is_refused(tmp_path, name):
    index = tmp_path / f"{name}.index.json"
    index.write_text("{")
    with pytest.raises(UserError, match=rf"{index.name} is no JSON"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(UserError, match=rf"{index.name} has no weight_map"):
        open_tensors(tmp_path)
    for strange in ("../elsewhere.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"x": strange}}))
        with pytest.raises(UserError, match=rf"{index.name} lists {strange!r}, which is no file of this folder"):
            open_tensors(tmp_path)


def test_an_archive_of_something_else_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("something.txt", "else")
    with pytest.raises(UserError, match=r"is not a file that torch\.save of PyTorch 1\.6 or later has written$"):
        open_tensors(tmp_path)
