"""Files of every family as tensors with our names: each name is used, or left out with a reason; nothing else is let through.

The files are those of tests/parity, which PyTorch and Paddle have written; right outputs are those tests' matter.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file, save_file

from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.freeze import freeze
from blip2x.models.weights.source import Source, open_source
from blip2x.models.weights.stored import StoredTensor
from blip2x.models.weights.tensor_files import open_tensors

PARITY = Path(__file__).resolve().parents[2] / "parity"
FILES = {  # file or folder -> family, what it is, names that are left out
    "lavis/stage1.pth": ("LAVIS", "stage 1", 3),
    "lavis/stage2_opt.pth": ("LAVIS", "stage 2", 1),
    "lavis/stage2_t5.pth": ("LAVIS", "stage 2", 1),
    "lavis/eva_vit_g.pth": ("EVA ViT", "an image encoder", 0),
    "lavis/clip_vit_L.pth": ("CLIP ViT", "an image encoder", 0),
    "paddlemix/stage1": ("PaddleMIX", "stage 1", 2),
    "paddlemix/stage1/model_state.pdparams": ("PaddleMIX", "stage 1", 2),
    "paddlemix/stage2_opt": ("PaddleMIX", "stage 2", 1),
    "huggingface/opt": ("Hugging Face", "stage 2", 0),
    "huggingface/opt_bfloat16": ("Hugging Face", "stage 2", 0),
    "huggingface/t5": ("Hugging Face", "stage 2", 0),
    "huggingface/retrieval": ("Hugging Face", "stage 1", 0),
    "huggingface/retrieval_float16": ("Hugging Face", "stage 1", 0),
    "language/opt": ("Hugging Face OPT", "a language model", 0),
    "language/opt_bfloat16_torch": ("Hugging Face OPT", "a language model", 1),
    "language/opt_bfloat16_shards": ("Hugging Face OPT", "a language model", 0),
    "language/t5": ("Hugging Face T5", "a language model", 0),
}
CHANGES = {
    "as it is": lambda array, shape: array,
    "transposed": lambda array, shape: array.T,
    "leading axes of 1 added": np.reshape,
    "one axis added": np.reshape,
    "first third; the keys' is zero": lambda array, shape: array[: len(array) // 3],
    "last third": lambda array, shape: array[-(len(array) // 3) :],
}
PARTS = ("vision", "ln_vision", "qformer", "language", "language_proj", "vision_proj", "text_proj", "itm_head", "temp")


@pytest.mark.parametrize("name", FILES)
def test_every_name_is_used_or_left_out_with_a_reason(name):
    source, stored = open_source(PARITY / name), open_tensors(PARITY / name)
    family, what, left_out = FILES[name]
    assert (source.family, source.what) == (family, what)
    assert {row.theirs for row in source.coverage} == stored.keys()
    ours = [row.ours for row in source.coverage if row.ours]
    assert len(ours) == len(set(ours)) and set(ours) == source.tensors.keys()
    assert {name.partition(".")[0] for name in ours} <= set(PARTS)
    dropped = [row for row in source.coverage if row.ours is None]
    assert len(dropped) == left_out and all(row.reason and row.reason != "unknown" for row in dropped)
    total = len(stored)
    assert source.summary().startswith(f"{total - left_out} of {total} tensors of {PARITY / name} ({family}) are used")
    for row in source.coverage:
        assert row.shape == stored[row.theirs].shape and row.dtype == str(stored[row.theirs].dtype)


@pytest.mark.parametrize("name", FILES)
def test_numbers_are_the_files_in_its_type_after_the_change_that_is_told(name):
    source, stored = open_source(PARITY / name), open_tensors(PARITY / name)
    for row in source.coverage:
        if row.ours:
            found = source.tensors[row.ours]
            expected = CHANGES[row.reason](stored[row.theirs].read(), found.shape)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            np.testing.assert_array_equal(found.read(), expected, err_msg=row.theirs)
            assert row.theirs in found.where


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_read_but_what_may_be_a_copy(name, monkeypatch):
    opened = []

    def watched(name: str, tensor: StoredTensor) -> StoredTensor:
        return replace(tensor, open=lambda: opened.append(name) or tensor.open())

    read = {name: watched(name, tensor) for name, tensor in open_tensors(PARITY / name).items()}
    monkeypatch.setattr("blip2x.models.weights.source.open_tensors", lambda path: read)
    open_source(PARITY / name)
    copies = re.compile(r".*(predictions\.(decoder\.)?\w+|(word_embeddings|embed_tokens|lm_head)\.\w+|qkv\.bias)")
    assert all(copies.fullmatch(name) for name in opened)


# files that are not right


def arrays(name: str) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(PARITY / name).items()}


@pytest.fixture
def saved(torch, tmp_path):
    """`saved(arrays, family)` -> a file as that system saves it."""

    def write(tensors, family):
        if family == "PaddleMIX":
            paddle.save({name: paddle.to_tensor(array) for name, array in tensors.items()}, str(tmp_path / "x.pdparams"))
            return tmp_path / "x.pdparams"
        if family == "LAVIS":
            return torch.save({"model": {n: torch.tensor(a) for n, a in tensors.items()}, "epoch": 9}, tmp_path / "x.pth")
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


EXTRA = [
    ("lavis/stage1.pth", "LAVIS", "Qformer.bert.encoder.layer.0.extra.weight"),
    ("lavis/stage1.pth", "LAVIS", "visual_encoder.blocks.0.extra"),
    ("lavis/stage2_t5.pth", "LAVIS", "something.else"),
    ("lavis/eva_vit_g.pth", "EVA ViT", "blocks.0.attn.extra"),
    ("lavis/clip_vit_L.pth", "CLIP ViT", "transformer.resblocks.0.extra"),
    ("paddlemix/stage1", "PaddleMIX", "Qformer.extra"),
    ("paddlemix/stage2_opt", "PaddleMIX", "language_model.opt.decoder.layers.0.extra"),
    ("huggingface/opt", "Hugging Face", "language_model.model.decoder.layers.0.extra"),
    ("huggingface/retrieval", "Hugging Face", "vision_model.encoder.layers.0.extra"),
]


@pytest.mark.parametrize(("name", "family", "extra"), EXTRA)
def test_a_name_that_no_table_knows_is_refused(saved, name, family, extra):
    system = family.replace("EVA ViT", "LAVIS").replace("CLIP ViT", "LAVIS")
    path = saved({**arrays(name), extra: np.ones(2, "f4")}, system)
    with pytest.raises(UserError, match=rf"has tensors that {family}'s files of BLIP-2 do not have: {extra}$"):
        open_source(path)


def test_many_unknown_names_are_cut_short(saved):
    path = saved({**arrays("lavis/stage1.pth"), **{f"x{i}": np.ones(1, "f4") for i in range(8)}}, "LAVIS")
    with pytest.raises(UserError, match=r"do not have: x0, x1, x2, x3, x4 and 3 more$"):
        open_source(path)


@pytest.mark.parametrize(
    ("name", "family", "second", "ours"),
    [
        ("lavis/stage2_opt.pth", "LAVIS", ("opt_proj.weight", "t5_proj.weight"), "language_proj.weight"),
        ("paddlemix/stage1", "PaddleMIX", ("temp", "Qformer.temp"), "temp"),
    ],
)
def test_two_names_for_one_tensor_are_refused(saved, name, family, second, ours):
    tensors = arrays(name)
    path = saved({**tensors, second[1]: tensors[second[0]]}, family)
    with pytest.raises(UserError, match=rf": {second[1]} is a second {ours}; there has to be one$"):
        open_source(path)


def test_a_packed_bias_beside_separate_ones_is_refused(saved):
    tensors = arrays("lavis/eva_vit_g.pth")
    tensors["blocks.1.attn.qkv.bias"] = np.zeros(48, "f4")
    with pytest.raises(UserError, match=r"tensor blocks\.1\.attn\.qkv\.bias: there is a second bias"):
        open_source(saved(tensors, "LAVIS"))


def test_what_is_no_model_of_a_known_family_is_refused(saved):
    with pytest.raises(UserError, match=r"holds no weights that blip2x knows \(lstm\.a, lstm\.b, \.\.\.\): Hugging Face's, L"):
        open_source(saved({"lstm.b": np.ones(1, "f4"), "lstm.a": np.ones(1, "f4")}, "LAVIS"))


def test_a_damaged_config_is_refused(tmp_path):
    shutil.copytree(PARITY / "huggingface/opt", tmp_path / "opt")
    (tmp_path / "opt/config.json").write_text("{")
    with pytest.raises(UserError, match=r"opt/config\.json is no JSON"):
        open_source(tmp_path / "opt")


def test_hugging_faces_settings_are_kept(tmp_path):
    source = open_source(PARITY / "huggingface/opt")
    assert source.config["model_type"] == "blip-2" and source.settings.keys() == {"config.json", "generation_config.json"}
    assert open_source(PARITY / "lavis/stage1.pth").config == {}


# copies of the embeddings


def test_a_head_that_lavis_ties_has_to_be_the_embeddings(saved):
    tensors = arrays("lavis/stage1.pth")
    tensors["Qformer.cls.predictions.decoder.weight"] = tensors["Qformer.cls.predictions.decoder.weight"] + 1
    with pytest.raises(UserError, match=r"tensor Qformer\.cls\.predictions\.decoder\.weight differs from .*word_embeddings"):
        open_source(saved(tensors, "LAVIS"))


def test_a_head_that_paddlemix_trained_apart_is_left_out_and_that_is_said(saved):
    """Also the one of OPT, which is random in files that PaddleNLP converted."""
    for name, head in (
        ("paddlemix/stage1", "Qformer.cls.predictions.decoder.weight"),
        ("paddlemix/stage2_opt", "language_model.lm_head.decoder_weight"),
    ):
        tensors = arrays(name)
        assert open_source(saved(tensors, "PaddleMIX")).summary().count("tied to the word embeddings") == 1
        tensors[head] = tensors[head] + 1
        source = open_source(saved(tensors, "PaddleMIX"))
        (reason,) = [row.reason for row in source.coverage if row.theirs == head]
        assert reason == "untied and different there; ours is tied to the word embeddings" and reason in source.summary()


# biases of keys

KEYS = slice(16, 32)  # of a packed bias of three times 16


def biases(source: Source) -> set[str]:
    pattern = re.compile(r"vision\.blocks\.\d+\.attention\.(qkv\.bias|query_bias|value_bias)")
    return {match[1] for name in source.tensors if (match := pattern.fullmatch(name))}


def test_biases_of_keys_are_left_out_where_all_are_zero(saved):
    tensors = {name: array.copy() for name, array in arrays("huggingface/opt").items()}
    packed = [name for name in tensors if name.endswith("self_attn.qkv.bias")]
    assert len(packed) == 2 and all(tensors[name][KEYS].any() for name in packed)
    kept = open_source(saved(tensors, "Hugging Face"))
    assert biases(kept) == {"qkv.bias"}
    tensors[packed[0]][KEYS] = 0
    assert biases(open_source(saved(tensors, "Hugging Face"))) == {"qkv.bias"}  # one block's are enough
    tensors[packed[1]][KEYS] = 0
    source = open_source(saved(tensors, "Hugging Face"))
    assert biases(source) == {"query_bias", "value_bias"}
    for index, name in enumerate(packed):
        attention = f"vision.blocks.{index}.attention."
        np.testing.assert_array_equal(source.tensors[f"{attention}query_bias"].read(), tensors[name][:16])
        np.testing.assert_array_equal(source.tensors[f"{attention}value_bias"].read(), tensors[name][32:])
        made = [row.ours for row in source.coverage if row.theirs == name]
        assert made == [f"{attention}query_bias", f"{attention}value_bias"]


def test_paddlemixs_biases_are_split_as_lavis_has_them():
    ours = open_source(PARITY / "paddlemix/stage1")
    theirs = open_source(PARITY / "lavis/stage1.pth")
    assert biases(ours) == biases(theirs) == {"query_bias", "value_bias"}


def test_clip_keeps_its_biases_of_keys(saved):
    tensors = arrays("lavis/clip_vit_L.pth")
    for name in tensors:
        if name.endswith("in_proj_bias"):
            tensors[name] = tensors[name] * 0
    assert biases(open_source(saved(tensors, "LAVIS"))) == {"qkv.bias"}


def test_a_packed_bias_of_another_length_is_left_to_the_model(saved):
    tensors = {name: array.copy() for name, array in arrays("huggingface/opt").items()}
    for name in tensors:
        if name.endswith("self_attn.qkv.bias"):
            tensors[name] = np.zeros(47, "f4")
    assert open_source(saved(tensors, "Hugging Face")).tensors["vision.blocks.0.attention.qkv.bias"].shape == (47,)


# checkpoints of ours


def checkpoint(tmp_path: Path, layers: dict[str, nn.Layer], frozen: tuple[str, ...] = ()) -> Path:
    model = nn.LayerDict(layers)
    for name in frozen:
        freeze(model[name])
    return save_checkpoint(tmp_path / "c", model, kind="k", step=1, frozen_origin=dict.fromkeys(frozen, "elsewhere"))


@pytest.mark.parametrize(
    ("names", "frozen", "what", "prefix"),
    [
        (["vision", "qformer", "language_proj"], ["vision"], "stage 2", ""),
        (["vision", "qformer", "itm_head"], [], "stage 1", ""),
        (["vision", "heads"], [], "an image encoder", ""),
        (["vision", "something_new"], ["vision"], "nothing of BLIP-2", ""),  # a whole model's all the same
        (["opt", "lm_head"], [], "a language model", "language."),
        (["shared", "encoder", "decoder"], [], "a language model", "language."),
    ],
)
def test_a_checkpoints_names_are_ours_and_a_part_that_was_saved_alone_gets_its_name(tmp_path, names, frozen, what, prefix):
    source = open_source(checkpoint(tmp_path, {name: nn.Linear(1, 1) for name in names}, tuple(frozen)))
    kept = [name for name in names if name not in frozen]
    assert source.tensors.keys() == {f"{prefix}{name}.{kind}" for name in kept for kind in ("weight", "bias")}
    assert (source.family, source.what) == ("blip2x", what) and source.manifest["kind"] == "k"
    assert all(row.reason == "as it is" for row in source.coverage)


@pytest.mark.parametrize(("name", "part"), [("class_token", "vision"), ("query_tokens", "qformer")])
def test_an_encoder_or_a_q_former_that_was_saved_alone(tmp_path, name, part):
    layer = nn.Linear(1, 1)
    layer.add_parameter(name, layer.create_parameter([1]))
    if part == "vision":
        layer = nn.LayerDict({"embeddings": layer})
    source = open_source(save_checkpoint(tmp_path / "c", layer, kind="k", step=1))
    assert source.has(f"{part}.") and all(name.startswith(f"{part}.") for name in source.tensors)


def test_a_huggingface_folder_of_one_file_may_be_named_by_it():
    whole = load_file(PARITY / "huggingface/t5/model.safetensors")
    assert len(open_source(PARITY / "huggingface/t5/model.safetensors").coverage) == len(whole)
