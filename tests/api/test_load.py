"""`blip2x.load`: what it finds, what it gives, what it refuses, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image

import blip2x
from blip2x.api.inputs import PictureReader
from blip2x.api.matching import MatchingModel
from blip2x.api.writing import WritingModel
from blip2x.config.compose import compose_config
from blip2x.data.transforms import EvalTransform
from blip2x.errors import UserError
from blip2x.tasks.common.launch import launch

PARITY = Path(__file__).parents[1] / "parity"
OPT, RETRIEVAL = PARITY / "decoding/opt", PARITY / "huggingface/retrieval"
HEADS = {"model.vision.num_heads": 2, "model.qformer.num_heads": 3}
PARTS = {"model.vision.weights": str(PARITY / "lavis/eva_vit_g.pth"), "model.language.weights": str(PARITY / "language/opt")}
SOURCES: dict[str, tuple[type, dict[str, Any]]] = {
    "huggingface/opt": (WritingModel, {}),
    "huggingface/t5": (WritingModel, {}),
    "huggingface/opt_bfloat16": (WritingModel, {}),
    "lavis/stage1.pth": (MatchingModel, HEADS),
    "lavis/stage2_opt.pth": (WritingModel, {**HEADS, **PARTS}),
    "paddlemix/stage1/model_state.pdparams": (MatchingModel, HEADS),
    "paddlemix/stage1": (MatchingModel, HEADS),
    "paddlemix/stage2_opt": (WritingModel, {**HEADS, "model.language.num_heads": 3}),
}


# what it gives


@pytest.mark.parametrize("name", SOURCES)
def test_every_family_without_a_warning(name):
    """In evaluation mode and in float32, whatever the file's type is."""
    kind, settings = SOURCES[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, processor = blip2x.load(PARITY / name, settings=settings)
    ours = [__file__, *map(str, Path(blip2x.__file__).parent.rglob("*.py"))]  # the first import of paddlenlp has its own
    assert not [str(one.message) for one in said if one.filename in ours]
    assert type(model) is kind and processor is None
    assert not any(layer.training for layer in model.network.sublayers(include_self=True))
    assert {parameter.dtype for parameter in model.network.parameters()} == {paddle.float32}
    files = [str(PARITY / name), *(value for key, value in settings.items() if key.endswith("weights"))]
    assert all(any(line.startswith("loaded ") and line.endswith(file) for line in model.report) for file in files)
    loaded = [int(line.split()[1]) for line in model.report if line.startswith("loaded ")]
    assert sum(loaded) == len(list(model.network.named_parameters()))


@pytest.mark.parametrize("name", ["retrieval", "retrieval_float16"])
def test_a_retrieval_folder_warns_once_about_the_head_that_it_lacks(name):
    """At the line of whoever called."""
    with pytest.warns(UserWarning) as said:
        model, _ = blip2x.load(PARITY / "huggingface" / name)
    (warning,) = said
    assert "has no head to write captions with: it starts random" in str(warning.message) and warning.filename == __file__
    assert isinstance(model, MatchingModel)
    assert "5 not in it (model.missing=initialise: starts random" in model.report[-1]


def test_missing_parts_may_be_refused():
    with pytest.raises(UserError, match=r"lacks tensors of the model: qformer.text.head_bias, .*set model.missing=initialise"):
        blip2x.load(RETRIEVAL, missing="error")
    model, _ = blip2x.load(PARITY / "lavis/stage1.pth", missing="error", settings=HEADS)  # nothing is missing here
    assert isinstance(model, MatchingModel)


@pytest.fixture
def digits(tmp_path) -> list[Path]:
    """Two picture files."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        Image.fromarray(generator.integers(0, 255, [60, 60, 3], dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("stage", [1, 2])
def test_what_was_trained_here_writes_what_the_task_writes(stage, demo, digits, tmp_path):
    """With the processor that comes along: its words, and its pictures' mean of 0.5."""
    checkpoint = demo("model=tiny_opt").checkpoint(f"pretrain_stage{stage}")
    prompt = "question: which digit is on the left? short answer:" if stage == 2 else ""
    command = ["task=predict", "model=tiny_opt", f"model.weights={checkpoint}", f"task.stage={stage}"]
    command += [f"task.inputs={tmp_path}", f"task.prompt='{prompt}'", "task.num_beams=2", "task.num_return_sequences=2"]
    command += ["task.max_new_tokens=6", f"paths.outputs={tmp_path}/outputs", "run_name=p"]
    launch(compose_config(command), command)
    rows = [json.loads(line) for line in (tmp_path / "outputs/p/predictions.jsonl").read_text().splitlines()]
    model, processor = blip2x.load(str(checkpoint))  # a path may be a string
    assert processor.tokenizer.family == {1: "bert", 2: "opt"}[stage]
    assert processor.transform(Image.new("RGB", (48, 48))).min() == -1
    options = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 1}
    asked = {"prompt": prompt} if stage == 2 else {}
    written = model.generate([Image.open(path) for path in digits], **asked, **options, return_output=True)
    assert written.texts == [text for row in rows for text in row["texts"]] and len(set(written.texts)) > 1
    np.testing.assert_allclose(written.scores, [score for row in rows for score in row["scores"]], rtol=0, atol=1e-4)


def test_parts_of_models_are_no_model(demo):
    run = demo("model=tiny_opt")
    for folder, what in (
        (run.checkpoint("pretrain_language"), "a language model"),
        (run.checkpoint("pretrain_vision"), "an image encoder"),
        (PARITY / "language/opt", "a language model"),
        (PARITY / "language/t5", "a language model"),
        (PARITY / "lavis/eva_vit_g.pth", "an image encoder"),
        (PARITY / "lavis/clip_vit_L.pth", "an image encoder"),
    ):
        with pytest.raises(UserError, match=rf"^{folder} holds {what}, not a BLIP-2 of stage 1 or 2$"):
            blip2x.load(folder)


# where it looks


def test_names_are_looked_up_below_the_root(tmp_path, monkeypatch):
    shutil.copytree(OPT, tmp_path / "elsewhere/Salesforce/blip2-opt-2.7b")
    shutil.copytree(OPT, tmp_path / "weights/mine")
    monkeypatch.chdir(tmp_path)
    assert isinstance(blip2x.load("mine", offline=True)[0], WritingModel)
    assert isinstance(blip2x.load("Salesforce/blip2-opt-2.7b", weights_root="elsewhere", offline=True)[0], WritingModel)
    monkeypatch.setenv("BLIP2X_WEIGHTS", str(tmp_path / "elsewhere"))
    assert isinstance(blip2x.load("Salesforce/blip2-opt-2.7b", offline=True)[0], WritingModel)
    with pytest.raises(UserError, match=r"^source=mine: there is no mine and no .*elsewhere/mine"):
        blip2x.load("mine")


def test_nothing_is_fetched_offline(tmp_path, monkeypatch):
    name = "Salesforce/blip2-opt-2.7b"
    sentence = rf"^source={name}: there is no {tmp_path}/{name}, and nothing may be fetched"
    with pytest.raises(UserError, match=sentence):
        blip2x.load(name, weights_root=tmp_path, offline=True)
    monkeypatch.setenv("BLIP2X_OFFLINE", "true")
    with pytest.raises(UserError, match=sentence):
        blip2x.load(name, weights_root=tmp_path)


# settings


def test_settings_win_over_what_the_weights_say():
    settings = {"model.vision.image_size": 20, "model.ln_vision_eps": 1e-3}
    model, _ = blip2x.load(OPT, settings=settings)
    assert model.encode_image(pixel_values=np.zeros([1, 3, 20, 20]), output="patches").shape == (1, 26, 20)
    assert model.network.ln_vision._epsilon == 1e-3
    model, _ = blip2x.load(OPT, settings={"vision.image_size": 20})  # below `model` already
    assert model.network.vision.image_size == 20


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such thing": ({"source": "no/thing"}, r"^source=no/thing: there is no no/thing and no weights/no/thing"),
    "nearly a name": ({"source": "blip2-opt-2.7b"}, r"did you mean .*Salesforce/blip2-opt-2\.7b"),
    "empty folder": ({"source": PARITY}, r"^no weights in "),
    "unknown type": ({"dtype": "int8"}, r"^dtype='int8' is none of float32, bfloat16, float16$"),
    "type on a CPU": ({"dtype": "bfloat16", "device": "cpu"}, r"^dtype=bfloat16: paddle computes in float32 only on a CPU; "),
    "half on a CPU": ({"dtype": "float16", "device": "cpu"}, r"^dtype=float16: paddle computes in float32 only on a CPU; "),
    "unknown device": ({"device": "cuda"}, r"^device='cuda' is none of auto, cpu, gpu$"),
    "unknown missing": ({"missing": "ignore"}, r"^missing='ignore' is none of error, initialise$"),
    "wrong key": ({"settings": {"model.vision.num_head": 2}}, r"num_head.* not in 'EvaVitConfig'"),
    "wrong group": ({"settings": {"model.vison.num_heads": 2}}, r"^settings has 'vison.num_heads', but the parts of a model"),
    "other group": ({"settings": {"task.num_beams": 2}}, r"^settings has 'task.num_beams', but the parts"),
    "wrong key of the model": ({"settings": {"model.eps": 2}}, r"eps.* not in 'ModelConfig'"),
    "wrong value": ({"settings": {"model.vision.num_heads": "two"}}, r"'two' of type 'str' could not be converted to Integer"),
    "another shape": ({"settings": {"model.vision.width": 18}}, r"class_token is \[1, 1, 20\] in the file, but \[1, 1, 18\]"),
    "no multiple": (
        {"settings": {"model.vision.num_heads": 3}},
        r"model.vision.width=20 is not a multiple of model.vision.num_heads=3",
    ),
    "heads unsaid": ({"source": PARITY / "lavis/stage1.pth"}, r"does not say how many heads .* model\.vision\.num_heads$"),
    "part unsaid": ({"source": PARITY / "lavis/stage2_opt.pth", "settings": HEADS}, r"say where it is with model\.vision"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case):
    options, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence):
        blip2x.load(**{"source": OPT, **options})


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="there may be a GPU")
def test_a_gpu_is_not_there():
    with pytest.raises(UserError, match=r"^device=gpu, but paddle finds no GPU; use device=cpu"):
        blip2x.load(OPT, device="gpu")


# what it leaves alone


def test_paddles_default_type_stays_as_it_was():
    assert paddle.get_default_dtype() == "float32"
    paddle.set_default_dtype("float64")
    try:
        model, _ = blip2x.load(OPT)
        with pytest.raises(UserError):
            blip2x.load(OPT, settings={"model.vision.width": 18})
        assert paddle.get_default_dtype() == "float64"
        assert {parameter.dtype for parameter in model.network.parameters()} == {paddle.float32}
    finally:
        paddle.set_default_dtype("float32")


def test_images_get_the_networks_type_and_not_the_default_one():
    """A GPU's half precision, which no CPU computes in, ends when the model is loaded."""
    cfg = compose_config(["dataset=coco"]).dataset.transform
    reader = PictureReader(EvalTransform(cfg, 4), 4, "bfloat16")
    assert reader(None, np.zeros([1, 3, 4, 4])).dtype == paddle.bfloat16


def python(code: str, *words: Any) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_to_import_blip2x_is_cheap():
    heavy = {"paddle", "paddlenlp", "numpy", "PIL", "tokenizers", "omegaconf", "hydra", "blip2x.api"}
    code = "import sys, blip2x; print(blip2x.__version__, callable(blip2x.load)); print(*sys.modules)"
    first, modules = python(code).stdout.splitlines()
    assert first == f"{blip2x.__version__} True"
    assert "blip2x" in modules.split() and not heavy & set(modules.split())


@pytest.mark.parametrize("first", [pytest.param("blip2x", marks=pytest.mark.slow), "paddle"])
def test_paddle_may_be_imported_first(first, tmp_path, pixels):
    """If it is not, nothing is printed, either."""
    code = f"""if True:
        import {first}
        import sys
        import numpy as np
        import blip2x
        model, _ = blip2x.load(sys.argv[1])
        image = np.load(sys.argv[2])
        ids = model.generate(pixel_values=image, max_new_tokens=8)
        np.savez(sys.argv[3], queries=model.encode_image(pixel_values=image), ids=ids)
    """
    image = pixels("opt", 2)
    np.save(tmp_path / "image.npy", image)
    done = python(code, OPT, tmp_path / "image.npy", tmp_path / "theirs.npz")
    assert first == "paddle" or not done.stdout + done.stderr
    theirs, (model, _) = np.load(tmp_path / "theirs.npz"), blip2x.load(OPT)
    np.testing.assert_allclose(theirs["queries"], model.encode_image(pixel_values=image), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(theirs["ids"], model.generate(pixel_values=image, max_new_tokens=8))
