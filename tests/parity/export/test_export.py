"""Models of every source written as Hugging Face folders by `task=convert`: read again, they are the models that they were.

transformers reads the same folders in an environment of its own, and finds the same numbers there:

    BLIP2X_EXPORTS=/tmp/exports pytest tests/parity/export
    python tests/parity/export/check_export.py /tmp/exports     # torch==2.13.0 and transformers==4.57.6

Before they are exported, the models are loaded with Hugging Face's epsilon of `ln_vision`: 1e-6, which all norms of the image
encoder share there, where LAVIS, PaddleMIX and blip2x have 1e-5. It is the only thing that an export changes.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image

import blip2x
from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage2 import join_prefix
from blip2x.models.weights.stored import StoredTensor
from blip2x.models.weights.tensor_files import open_tensors
from blip2x.models.weights.write import write_safetensors
from blip2x.tasks.common import launch as launch_module
from blip2x.tasks.common.launch import launch

HERE = Path(__file__).parent
LAVIS, PADDLEMIX, LANGUAGE, TOKENIZERS = (HERE.parent / name for name in ("lavis", "paddlemix", "language", "tokenizers"))
HEADS = {"model.vision.num_heads": 2, "model.qformer.num_heads": 3}  # which no shape tells
EVA = {"model.vision.weights": LAVIS / "eva_vit_g.pth"}
EPS = {"model.ln_vision_eps": 1e-6}
TEXTS = ["Question: how many cats are there? Answer:", "a photo of"]
SPARE_ROWS = 8  # of words behind the tokenizer's, as the published models have; one becomes the image's

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A folder with a subfolder for each model; a new one, or the one that BLIP2X_EXPORTS names."""
    folder = Path(os.environ.get("BLIP2X_EXPORTS") or tmp_path_factory.mktemp("exports"))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def languages(tmp_path_factory) -> Path:
    """The language models "opt" and "t5" with tokenizers, and so with more words: random rows."""
    root = tmp_path_factory.mktemp("languages")
    for kind, words in (("opt", ["model.decoder.embed_tokens.weight"]), ("t5", ["shared.weight", "lm_head.weight"])):
        folder = shutil.copytree(TOKENIZERS / kind, root / kind)
        for packed in folder.glob("*.gz"):
            packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
            packed.unlink()
        vocabulary = folder / "vocab.json" if kind == "opt" else folder / "tokenizer.json"
        read = json.loads(vocabulary.read_text(encoding="utf-8"))
        count = len(read) if kind == "opt" else max(token["id"] for token in read["added_tokens"]) + 1
        tensors = {name: tensor.read() for name, tensor in open_tensors(LANGUAGE / kind).items()}
        generator = np.random.default_rng(0)
        for name in words:
            rows = generator.standard_normal([count + SPARE_ROWS, tensors[name].shape[1]]).astype(np.float32)
            tensors[name] = rows * tensors[name].std()
        stored = {name: StoredTensor.of(name, array) for name, array in tensors.items()}
        write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
        config = json.loads((LANGUAGE / kind / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": count + SPARE_ROWS}))
    return root


Make = Callable[[str, Path, dict[str, Any]], tuple[Any, Any, Path]]


@pytest.fixture
def exported(exports, monkeypatch) -> Make:
    """`exported(name, weights, settings)` -> (the model as it was, the exported one with its processor, its folder)."""

    def make(name: str, weights: Path, settings: dict[str, Any]) -> tuple[Any, Any, Path]:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        words = [f"{key}={value}" for key, value in settings.items()]
        command = ["task=convert", "model=auto", f"model.weights={weights}", *words]
        command += [f"paths.outputs={exports}", f"run_name={name}"]
        with monkeypatch.context() as patch:  # for this run only: the demo's, which other tests read, has its report
            patch.setattr(launch_module, "write_report", lambda folder: folder)  # which takes half of the time
            launch(compose_config([*command, "overwrite=true"]), command)
        folder = exports / name
        before, _ = blip2x.load(weights, settings=settings | EPS)
        if "qformer.text.head_bias" in dict(before.network.named_parameters()):
            with pytest.warns(UserWarning, match="no head to write captions"):
                after = blip2x.load(folder / "converted")
        else:
            after = blip2x.load(folder / "converted")
        return before, after, folder

    return make


def test_stage_1_of_lavis(exported):
    check_stage1(*exported("lavis_stage1", LAVIS / "stage1.pth", HEADS))


def test_stage_1_of_the_demo(exported, demo):
    check_stage1(*exported("trained_stage1", demo("model=tiny_opt").checkpoint("pretrain_stage1"), {}))


def test_stage_2_of_paddlemix(exported):
    settings = {**HEADS, "model.language.num_heads": 3}
    check_stage2(*exported("paddlemix_stage2_opt", PADDLEMIX / "stage2_opt", settings))


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_stage_2_of_lavis_with_its_parts(kind, with_tokenizer, exported, languages):
    settings = {**HEADS, **EVA, "model.language.weights": (languages if with_tokenizer else LANGUAGE) / kind}
    name = f"lavis_stage2_{kind}{'_words' if with_tokenizer else ''}"
    check_stage2(*exported(name, LAVIS / f"stage2_{kind}.pth", settings))


@pytest.mark.parametrize("model", ["tiny_opt", pytest.param("tiny_t5", marks=pytest.mark.slow)])
def test_stage_2_of_the_demo(model, exported, demo):
    name = f"trained_stage2_{model.removeprefix('tiny_')}"
    check_stage2(*exported(name, demo(f"model={model}").checkpoint("pretrain_stage2"), {}))


def check_stage1(before: Any, after: tuple[Any, Any], folder: Path) -> None:
    model, processor = after
    inputs = texts(before.network.qformer.text.word_embeddings.weight.shape[0], side="right") | pictures(model)
    check(before, model, inputs, stage1_outputs, folder)
    write_texts(folder, model, processor, None)


def check_stage2(before: Any, after: tuple[Any, Any], folder: Path) -> None:
    model, processor = after
    network = before.network
    inputs = texts(network.language.vocab_size, side="right" if network.language.is_encoder_decoder else "left")
    if network.language.is_encoder_decoder:
        inputs["decoder_ids"] = np.insert(inputs["ids"][:, ::-1], 0, 0, axis=1)
    config = json.loads((folder / "converted" / "config.json").read_text())
    assert not np.isin(inputs["ids"], config["image_token_index"]).any()
    check(before, model, inputs | pictures(model), stage2_outputs, folder)
    room = processor and config["image_token_index"] >= processor.tokenizer.vocab_size
    write_texts(folder, model, processor, model.generate(picture(), prompt=TEXTS, max_new_tokens=6) if room else None)


def check(before: Any, after: Any, inputs: Arrays, compute: Callable, folder: Path) -> None:
    """The parameters are the same bit by bit, so what is computed is; a matrix product may be split up otherwise."""
    theirs, ours = dict(before.network.named_parameters()), dict(after.network.named_parameters())
    assert theirs.keys() == ours.keys()
    for name, parameter in ours.items():
        if not name.startswith(("temp", "qformer.text.head_")):  # which Hugging Face's models have not
            np.testing.assert_array_equal(parameter.numpy(), theirs[name].numpy(), err_msg=name)
    outputs = compute(before, inputs)
    for name, array in compute(after, inputs).items():
        atol = 1e-6 * np.abs(array).max(initial=1) if array.dtype.kind == "f" else 0
        np.testing.assert_allclose(array, outputs[name], rtol=0, atol=atol, err_msg=name)
    np.savez(folder / "ours.npz", **{f"input.{key}": array for key, array in inputs.items()}, **outputs)


def pictures(model: Any) -> Arrays:
    size = model.network.vision.image_size
    return {"image": np.random.default_rng(1).standard_normal([3, 3, size, size]).astype(np.float32)}


def texts(words: int, side: str) -> Arrays:
    """Three texts of unequal lengths, padded, of words that are none of the first, special ones."""
    ids = np.random.default_rng(2).integers(5, words - SPARE_ROWS - 1 if words > 1000 else words, [3, 6])
    mask = np.arange(6) < np.array([6, 3, 4])[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    return {"ids": np.where(mask, ids, 1), "mask": mask.astype(np.int64)}


def stage1_outputs(model: Any, inputs: Arrays) -> Arrays:
    image, text = {"pixel_values": inputs["image"]}, {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    return {
        **features(model, inputs["image"]),
        "image_vectors": model.encode_image(**image, output="projected"),
        "text_vectors": model.encode_text(**text),
        "itc": model.itc(**image, **text),
        "itm": model.itm(**image, **text),
    }


def stage2_outputs(model: Any, inputs: Arrays) -> Arrays:
    image, network = inputs["image"], model.network
    outputs = {**features(model, image), "projected": model.encode_image(pixel_values=image, output="projected")}
    ids, mask = paddle.to_tensor(inputs["ids"]), paddle.to_tensor(inputs["mask"])
    with paddle.no_grad():
        prefix = join_prefix(network.language, network.encode(paddle.to_tensor(image)), ids, mask)
        if network.language.is_encoder_decoder:
            decoder_ids = paddle.to_tensor(inputs["decoder_ids"])
            outputs["logits"] = network.language(*prefix, decoder_ids, paddle.ones_like(decoder_ids)).numpy()
        else:
            logits = network.language(*prefix).numpy()[:, -ids.shape[1] :]
            outputs["logits"] = logits[inputs["mask"] == 1]  # what padding predicts means nothing
    prompts = {"pixel_values": image, "input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    for name, options in {"greedy": {}, "beams": {"num_beams": 3, "length_penalty": -1.0}}.items():
        outputs[name] = model.generate(**prompts, **options, max_new_tokens=8)
        written = model.generate(pixel_values=image, **options, max_new_tokens=8, return_output=True)
        outputs[f"{name}_without_prompt"] = written.ids
    return outputs


def features(model: Any, image: np.ndarray) -> Arrays:
    with paddle.no_grad():
        tower = model.network.vision(paddle.to_tensor(image)).numpy()
    patches, queries = (model.encode_image(pixel_values=image, output=output) for output in ("patches", "queries"))
    return {"tower": tower, "patches": patches, "queries": queries}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, [50, 70, 3], dtype=np.uint8))


def write_texts(folder: Path, model: Any, processor: Any, written: list[str] | None) -> None:
    """What the processor makes of a picture and texts, and what was written behind prompts."""
    if processor is None:
        return
    arrays = processor(picture(), TEXTS)
    picture().save(folder / "picture.png")
    np.save(folder / "pixel_values.npy", arrays["pixel_values"])
    rows = [ids[mask == 1].tolist() for ids, mask in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)]
    assert len(set(map(tuple, rows))) == len(TEXTS)
    content = {"texts": TEXTS, "ids": rows, "written": written}
    (folder / "texts.json").write_text(json.dumps(content), encoding="utf-8")
