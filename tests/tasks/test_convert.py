"""Weights from one family's format to another's: bit by bit, with every name accounted for, and whole or not at all."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import blip2x
from blip2x.config.compose import compose_config
from blip2x.data.tokenize import train_tokenizer
from blip2x.errors import UserError
from blip2x.models.weights.export import usual_ends
from blip2x.models.weights.manifest import read_manifest
from blip2x.models.weights.source import open_source
from blip2x.models.weights.tensor_files import open_tensors
from blip2x.tasks import convert as convert_module
from blip2x.tasks.common import launch as launch_module
from blip2x.tasks.common.launch import launch

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "parity"
HUGGING_FACE, LAVIS, PADDLEMIX, LANGUAGE = (PARITY / name for name in ("huggingface", "lavis", "paddlemix", "language"))
FOLDERS = ["opt", "t5", "retrieval", "opt_bfloat16", "retrieval_float16"]
SETTINGS = ["config.json", "generation_config.json"]
HEADS = {"model.vision.num_heads": 2, "model.qformer.num_heads": 3}  # which no shape tells
EVA = {"model.vision.weights": LAVIS / "eva_vit_g.pth"}
OTHERS: dict[str, tuple[Path, dict[str, Any]]] = {  # weights, and what they do not say
    "lavis_stage1": (LAVIS / "stage1.pth", HEADS),
    "lavis_stage2_opt": (LAVIS / "stage2_opt.pth", {**HEADS, **EVA, "model.language.weights": LANGUAGE / "opt"}),
    "lavis_stage2_t5": (LAVIS / "stage2_t5.pth", {**HEADS, **EVA, "model.language.weights": LANGUAGE / "t5"}),
    "paddlemix_stage1": (PADDLEMIX / "stage1", HEADS),
    "paddlemix_stage2": (PADDLEMIX / "stage2_opt", {**HEADS, "model.language.num_heads": 3}),
}
NOT_IN_HUGGING_FACE = ("temp", "qformer.text.head_")
CAPTION_HEAD = {f"qformer.text.head_{name}" for name in ("bias", "norm.bias", "norm.weight")}
CAPTION_HEAD |= {f"qformer.text.head_transform.{name}" for name in ("bias", "weight")}

Convert = Callable[..., Path]


@pytest.fixture
def convert(tmp_path, monkeypatch) -> Convert:
    """`convert(weights, *overrides, settings=...)` -> the folder that was written; each call has a run folder of its own."""
    outputs = tmp_path / "outputs"

    def run(weights: Path, *overrides: str, settings: dict[str, Any] | None = None) -> Path:
        words = [*overrides, *(f"{key}={value}" for key, value in (settings or {}).items())]
        count = len(list(outputs.iterdir())) if outputs.exists() else 0
        command = ["task=convert", "model=auto", f"model.weights={weights}", f"paths.outputs={outputs}", f"run_name={count}"]
        with monkeypatch.context() as patch:  # for this run only: the demo's, which other tests read, has its report
            patch.setattr(launch_module, "write_report", lambda folder: folder)  # which takes half of the time
            launch(compose_config([*command, *words]), [*command, *words])
        return outputs / str(count) / "converted"

    return run


def coverage(converted: Path) -> list[dict[str, str]]:
    with (converted.parent / "coverage.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def arrays(source: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(source).items()}


def assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


def parameters(weights: Path, settings: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    model, _ = blip2x.load(weights, settings=plain(settings))
    return {name: parameter.numpy() for name, parameter in model.network.named_parameters()}


def plain(settings: dict[str, Any] | None) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in (settings or {}).items()}


# Hugging Face -> blip2x -> Hugging Face


@pytest.mark.parametrize("name", FOLDERS)
def test_there_and_back_is_the_same_to_the_bit(name, convert):
    source = HUGGING_FACE / name
    checkpoint = convert(source, "task.to=blip2x")
    assert read_manifest(checkpoint)["kind"] == "convert"
    back = convert(checkpoint)
    assert_same_bytes(arrays(back), arrays(source))
    for file in SETTINGS:
        if (source / file).exists():
            assert json.loads((back / file).read_text()) == json.loads((source / file).read_text())
        else:
            assert not (back / file).exists()
    assert all(row["ours"] and row["theirs"] for row in coverage(checkpoint) + coverage(back))  # nothing is left out


def test_the_files_are_safetensors(convert):
    """As the format's own library reads them, with what transformers looks for in their heads."""
    whole = convert(HUGGING_FACE / "t5")
    assert_same_bytes(load_file(whole / "model.safetensors"), load_file(HUGGING_FACE / "t5" / "model.safetensors"))
    with safe_open(whole / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


def test_shards_and_their_index(convert):
    folder = convert(HUGGING_FACE / "opt", "task.max_shard_gb=2e-5")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    held = {file: load_file(folder / file) for file in files}
    assert index["weight_map"] == {name: file for file in files for name in held[file]}
    assert sum(map(len, held.values())) == len(index["weight_map"])  # none twice
    assert index["metadata"]["total_size"] == sum(array.nbytes for shard in held.values() for array in shard.values())
    assert all(len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= 2e4 for shard in held.values())
    assert_same_bytes(arrays(folder), arrays(HUGGING_FACE / "opt"))


# LAVIS and PaddleMIX


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("to", ["blip2x", "huggingface"])
def test_what_is_loaded_from_either_is_the_same(name, to, convert, capsys):
    """But for the one value of LAVIS's models that Hugging Face's format does not keep, which is said."""
    weights, settings = OTHERS[name]
    converted = convert(weights, f"task.to={to}", settings=settings)
    assert ("note: ln_vision has eps 1e-05" in capsys.readouterr().out) == (to == "huggingface")
    before, _ = blip2x.load(weights, settings=plain(settings))
    loses_head = to == "huggingface" and "stage1" in name
    with pytest.warns(UserWarning, match="no head") if loses_head else nullcontext():
        after, _ = blip2x.load(converted, settings={"model.ln_vision_eps": 1e-5} if to == "huggingface" else None)
    ours, theirs = dict(after.network.named_parameters()), dict(before.network.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, parameter in theirs.items():
        if not (loses_head and key.startswith(NOT_IN_HUGGING_FACE)):
            np.testing.assert_array_equal(ours[key].numpy(), parameter.numpy(), err_msg=key)
    for one, other in zip(outputs(before), outputs(after), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)  # a sum may be split up otherwise


def outputs(model: Any) -> list[np.ndarray]:
    """What is written ends where the weights say, and begins without a prompt as they say."""
    image = np.random.default_rng(0).standard_normal([2, 3, 12, 12]).astype(np.float32)
    ids, found = np.array([[2, 9, 4, 17], [2, 30, 22, 11]]), [model.encode_image(pixel_values=image, output="projected")]
    if hasattr(model, "itm"):
        return [*found, model.itm(pixel_values=image, input_ids=ids)]
    short = {"pixel_values": image, "max_new_tokens": 12}
    return [*found, model.generate(**short), model.generate(**short, input_ids=ids)]


def test_what_a_text_ends_with_is_the_line_break_in_opts_own_vocabulary():
    assert usual_ends("opt", 50272) == (50118, 1)
    assert usual_ends("opt", 50118) == (2, 1)
    assert usual_ends("t5", 32128) == (1, 0)


def test_biases_of_keys_are_zero_where_lavis_has_none(convert):
    folder = convert(LAVIS / "stage1.pth", settings=HEADS)
    packed = arrays(folder)["vision_model.encoder.layers.1.self_attn.qkv.bias"].reshape(3, -1)
    theirs = arrays(LAVIS / "stage1.pth")
    np.testing.assert_array_equal(packed[0], theirs["visual_encoder.blocks.1.attn.q_bias"])
    np.testing.assert_array_equal(packed[1], 0)
    np.testing.assert_array_equal(packed[2], theirs["visual_encoder.blocks.1.attn.v_bias"])


def test_paddlemix_folders_have_a_config_of_their_own(convert, tmp_path):
    """Its text_config is a name."""
    folder = shutil.copytree(PADDLEMIX / "stage2_opt", tmp_path / "mix")
    parts = {"qformer_config": {"num_attention_heads": 3}, "vision_config": {"num_heads": 2, "embed_dim": 16}}
    (folder / "config.json").write_text(json.dumps({"model_type": "blip-2", "text_config": "facebook/opt-2.7b", **parts}))
    settings = OTHERS["paddlemix_stage2"][1]
    ours, theirs = (
        json.loads((convert(f, settings=settings) / "config.json").read_text()) for f in (folder, PADDLEMIX / "stage2_opt")
    )
    assert ours == theirs


# what becomes of every name


@pytest.mark.parametrize("name", OTHERS)
def test_every_name_is_used_or_left_out_for_a_reason(name, convert):
    weights, settings = OTHERS[name]
    converted = convert(weights, "task.to=blip2x", settings=settings)
    rows = coverage(converted)
    files = [str(value) for value in (weights, *settings.values()) if isinstance(value, Path)]
    assert list(dict.fromkeys(row["file"] for row in rows)) == files
    for file in files:
        stored = open_tensors(file)
        found = Counter(row["theirs"] for row in rows if row["file"] == file)
        assert found.keys() == stored.keys()
        for theirs, times in found.items():  # packed biases make two of ours
            assert times == (2 if theirs.endswith("attn.qkv.bias") else 1), theirs
        for row in rows:
            if row["file"] == file:
                tensor = stored[row["theirs"]]
                assert row["reason"] and (row["shape"], row["dtype"]) == (str(list(tensor.shape)), str(tensor.dtype))
    made = Counter(row["ours"] for row in rows if row["ours"])
    assert set(made.values()) == {1} and made.keys() == open_tensors(converted / "model.safetensors").keys()


def test_what_hugging_face_has_no_place_for_is_said(convert):
    converted = convert(LAVIS / "stage1.pth", settings=HEADS)
    rows = [row for row in coverage(converted) if not row["theirs"]]
    assert {row["ours"] for row in rows} == {"temp", *CAPTION_HEAD}
    reasons = {row["reason"] for row in rows if row["ours"] == "temp"}
    assert reasons == {"not written: Hugging Face's models do not train the contrast"}
    assert {row["reason"] for row in rows if row["ours"] != "temp"} == {
        "not written: Hugging Face's Q-Former writes no captions"
    }
    results = json.loads((converted.parent / "results.json").read_text())["convert"]
    left_out = sum(not row["ours"] for row in coverage(converted))
    assert (results["tensors"], results["left_out"]) == (len(open_source(LAVIS / "stage1.pth").tensors), left_out + len(rows))


def test_a_part_may_come_from_a_whole_model(convert):
    """Then the rest of that one is accounted for, too, and left out."""
    weights, settings = OTHERS["lavis_stage2_opt"]
    whole = convert(weights, settings={**settings, "model.vision.weights": LAVIS / "stage1.pth"})
    rows = [row for row in coverage(whole) if row["file"] == str(LAVIS / "stage1.pth")]
    assert {row["theirs"].startswith("visual_encoder.") for row in rows if row["ours"]} == {True}
    assert {row["reason"] for row in rows if row["theirs"].startswith("ln_vision.")} == {"not of this part of the model"}
    theirs = arrays(LAVIS / "stage1.pth")["visual_encoder.blocks.0.mlp.fc1.weight"]
    np.testing.assert_array_equal(arrays(whole)["vision_model.encoder.layers.0.mlp.fc1.weight"], theirs)


# types


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_numbers_are_rounded_to_the_type(dtype, convert):
    folder = convert(HUGGING_FACE / "t5", f"task.dtype={dtype}")
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rounded = {name: array.astype(wanted) for name, array in arrays(HUGGING_FACE / "t5").items()}
    assert_same_bytes(arrays(folder), rounded)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    checkpoint = convert(HUGGING_FACE / "t5", f"task.dtype={dtype}", "task.to=blip2x")
    assert {tensor.dtype for tensor in open_tensors(checkpoint / "model.safetensors").values()} == {wanted}


def test_a_config_names_the_type_of_every_part(convert):
    folder = convert(HUGGING_FACE / "opt_bfloat16", "task.dtype=float32")
    config, before = (json.loads((path / "config.json").read_text()) for path in (folder, HUGGING_FACE / "opt_bfloat16"))
    for part in ({}, "vision_config", "qformer_config", "text_config"):
        assert (config[part] if part else config)["dtype"] == "float32"
        assert (before[part] if part else before)["dtype"] == "bfloat16"
    exact = {name: array.astype(np.float32) for name, array in arrays(HUGGING_FACE / "opt_bfloat16").items()}
    assert_same_bytes(arrays(folder), exact)


def test_numbers_that_a_type_does_not_hold_are_refused(convert, tmp_path):
    folder = shutil.copytree(HUGGING_FACE / "t5", tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["language_projection.weight"][0, 0] = 7e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"language_projection.weight holds numbers that float16 does not; choose another"):
        convert(folder, "task.dtype=float16")
    assert convert(folder, "task.dtype=bfloat16").exists()


# beside the weights


@pytest.fixture
def with_tokenizer(tmp_path) -> Path:
    """The OPT folder with a tokenizer of as many words."""
    folder = shutil.copytree(HUGGING_FACE / "opt", tmp_path / "named")
    words = train_tokenizer(["a photo of " + " ".join(f"word{n}" for n in range(33))], "opt")
    assert words.vocab_size == 41
    words.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"its": "own"}')
    return folder


def test_tokenizers_go_along(with_tokenizer, convert):
    folder = convert(with_tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (with_tokenizer / name).read_bytes()
    checkpoint = convert(with_tokenizer, "task.to=blip2x")
    _, own = blip2x.load(with_tokenizer)
    for place in (folder, checkpoint, convert(checkpoint)):
        _, processor = blip2x.load(place)
        assert processor.tokenizer.tokens("a photo of word7") == own.tokenizer.tokens("a photo of word7")


def test_a_tokenizer_is_written_with_what_stands_around_a_text(demo, convert):
    """Ours puts it there itself; Hugging Face's reads it from the file."""
    for stage, before, after in (("pretrain_stage1", ["[CLS]"], ["[SEP]"]), ("pretrain_stage2", ["</s>"], [])):
        folder = convert(demo("model=tiny_opt").checkpoint(stage))
        written = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert written.encode("a red two").tokens == [*before, "a", "red", "two", *after]
        named = json.loads((folder / "tokenizer_config.json").read_text())
        special = [token for key, token in named.items() if key.endswith("_token")]
        assert len(special) >= 4 and all(written.token_to_id(token) is not None for token in special)


def test_hugging_faces_processor_finds_the_images_place(convert, demo, capsys):
    """It puts the first token behind the tokenizer's where the image goes, if the model has a row for it."""
    weights, settings = OTHERS["lavis_stage2_opt"]
    folder = convert(weights, settings=settings)
    assert json.loads((folder / "processor_config.json").read_text())["num_query_tokens"] == 5
    assert json.loads((folder / "config.json").read_text())["image_token_index"] == 0  # <s>, of which BLIP-2 makes no use
    assert "<image>" not in capsys.readouterr().out
    convert(demo("model=tiny_opt").checkpoint("pretrain_stage2"))
    assert "words have no place for the <image> that Hugging Face's processor will add" in capsys.readouterr().out


# what was trained here


@pytest.mark.parametrize("stage", ["pretrain_stage1", "pretrain_stage2"])
@pytest.mark.parametrize("to", ["blip2x", "huggingface"])
def test_a_checkpoint_with_parts_elsewhere_becomes_whole(stage, to, demo, convert):
    source = demo("model=tiny_opt").checkpoint(stage)
    assert read_manifest(source)["frozen"]["names"]
    converted = convert(source, f"task.to={to}")
    lost = to == "huggingface" and stage == "pretrain_stage1"
    with pytest.warns(UserWarning, match="no head") if lost else nullcontext():
        after, processor = blip2x.load(converted)
    before, own = blip2x.load(source)
    theirs = dict(before.network.named_parameters())
    for name, parameter in after.network.named_parameters():
        if not (lost and name.startswith(NOT_IN_HUGGING_FACE)):
            np.testing.assert_array_equal(parameter.numpy(), theirs[name].numpy(), err_msg=name)
    text = "a red two left of a blue three"
    assert processor.tokenizer.tokens(text) == own.tokenizer.tokens(text)
    assert np.array_equal(processor.transform._shift, own.transform._shift)  # mean 0.5, not CLIP's
    if to == "blip2x":
        assert read_manifest(converted)["frozen"] == {"names": [], "origin": {}}
    else:
        assert json.loads((converted / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3


# refusals


def nothing_converted(outputs: Path) -> bool:
    return not list(outputs.rglob("converted"))


def test_clip_has_no_place_in_hugging_faces_models(convert, tmp_path):
    parts = {**HEADS, "model.vision.weights": LAVIS / "clip_vit_L.pth", "model.language.weights": LANGUAGE / "t5"}
    with pytest.raises(UserError, match=r"^Hugging Face's BLIP-2 has no CLIP image encoder.*; use task.to=blip2x$"):
        convert(LAVIS / "stage2_t5.pth", settings=parts)
    assert nothing_converted(tmp_path)
    checkpoint = convert(LAVIS / "stage2_t5.pth", "task.to=blip2x", settings=parts)
    before, after = parameters(LAVIS / "stage2_t5.pth", parts), parameters(checkpoint)
    assert_same_bytes(after, before)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_missing_part_is_asked_for_by_its_key(part, convert, tmp_path):
    weights, settings = OTHERS["lavis_stage2_opt"]
    there = {key: value for key, value in settings.items() if key != f"model.{part}.weights"}
    with pytest.raises(UserError, match=rf"do not hold the {part} part, .*; say where it is with model.{part}.weights$"):
        convert(weights, settings=there)
    assert not (tmp_path / "outputs").exists()


def test_a_part_that_no_config_names_either(convert, tmp_path):
    """Its shape is given, so only its weights are missing."""
    weights, settings = OTHERS["lavis_stage2_opt"]
    shape = {"kind": "eva_vit", "mlp_width": 26, "depth": 2, "image_size": 12, "patch_size": 4, "weights": "null"}
    settings = settings | {f"model.vision.{key}": value for key, value in shape.items()}
    with pytest.raises(UserError, match=r"set model\.vision\.weights"):
        convert(weights, settings=settings)
    assert not (tmp_path / "outputs").exists()
    with pytest.raises(UserError, match=r"does not hold the vision part; say where it is with model\.vision\.weights"):
        convert(weights, settings=settings | {"model.vision.frozen": "false"})
    assert nothing_converted(tmp_path)


@pytest.mark.parametrize(
    ("weights", "settings"),
    [(LAVIS / "eva_vit_g.pth", {}), (LANGUAGE / "opt", {"model.vision.kind": "eva_vit", "model.vision.width": 1408})],
)
def test_a_part_alone_is_no_model(weights, settings, convert, tmp_path):
    with pytest.raises(
        UserError, match=r"but task=convert needs one of pretrain_stage1, pretrain_stage2, .* or vqa_finetune, or publ"
    ):
        convert(weights, settings=HEADS | settings)
    assert not (tmp_path / "outputs").exists()


def test_another_model_than_the_weights(tmp_path):
    command = ["task=convert", "model=tiny_opt", f"model.weights={HUGGING_FACE / 'opt'}", f"paths.outputs={tmp_path / 'o'}"]
    with pytest.raises(UserError, match=r"^model=tiny_opt is not the model of .*: model.vision.width is 96, but 16 there; "):
        launch(compose_config(command), command)
    assert not (tmp_path / "o").exists()


def test_a_damaged_tensor_leaves_nothing(convert, tmp_path):
    checkpoint = convert(HUGGING_FACE / "opt", "task.to=blip2x")
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-10] ^= 1  # of the last tensor, so that the others are written already
    (damaged / "model.safetensors").write_bytes(content)
    for to in ("blip2x", "huggingface"):
        with pytest.raises(UserError, match="is damaged: its checksum is not the recorded one"):
            convert(damaged, f"task.to={to}")
    assert list(tmp_path.rglob("converted")) == [checkpoint]


def test_an_interrupted_conversion_leaves_nothing(convert, tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_json", interrupt)  # behind the weights
    with pytest.raises(KeyboardInterrupt):
        convert(HUGGING_FACE / "opt")
    assert nothing_converted(tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "size_of", lambda tensor: 2**50)
    with pytest.raises(UserError, match=r"MiB free on its disk, \d+ MiB are needed; make room or set paths.outputs"):
        convert(HUGGING_FACE / "opt")
    assert nothing_converted(tmp_path) and not list(tmp_path.rglob("*.partial"))


def test_the_command_line(tmp_path):
    words = ["task=convert", "model=auto", f"model.weights={LAVIS / 'stage2_opt.pth'}", f"paths.outputs={tmp_path / 'o'}"]
    words += [f"{key}={value}" for key, value in HEADS.items()]
    done = subprocess.run([sys.executable, "runners/run.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "say where it is with model.vision.weights" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and not (tmp_path / "o").exists()
