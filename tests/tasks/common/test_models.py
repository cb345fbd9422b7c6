"""Models from checkpoints: whose weights and whose tokenizer they have, and what is frozen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file, save_file

from blip2x.config.compose import compose_config
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.models.weights.describe import follow_source, settings_of
from blip2x.models.weights.names.language import BERT
from blip2x.models.weights.names.table import Change
from blip2x.registry import TASKS, VISION_ENCODERS
from blip2x.tasks.common.models import ModelLoader

PARITY = Path(__file__).resolve().parents[2] / "parity"
FEW = ["dataset.train_scenes=20", "dataset.test_scenes=8"]
NO_DATA = ["dataset=custom", "dataset.images=/no/where"]


@pytest.fixture
def loader(small, run):
    """`loader(*overrides)`."""
    return lambda *overrides: ModelLoader.of_run(compose_config(["task=caption", *small, *overrides]), run)


def said(run):
    """What stands on the console, in one line."""
    return " ".join(run.console.file.getvalue().split())


def frozen(layer):
    return all(parameter.stop_gradient for parameter in layer.parameters())


def test_stage_2_has_its_own_weights_and_those_of_its_frozen_parts(loader, trained, run):
    made = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage2/checkpoint")
    model, _ = made.stage2(new_projection=False)
    assert frozen(model.vision) and frozen(model.language) and not frozen(model.qformer) and not model.training
    other, _ = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage2/checkpoint").stage2(new_projection=False)
    for name, parameter in other.named_parameters():  # all come from files: nothing is left to chance
        np.testing.assert_array_equal(parameter.numpy(), dict(model.named_parameters())[name].numpy(), err_msg=name)
    assert made.frozen_origin("vision", "language") == {
        "vision": str(trained / "pretrain_vision/checkpoint"),
        "language": str(trained / "pretrain_language/checkpoint"),
    }
    for stage in ("pretrain_stage2", "pretrain_vision", "pretrain_language"):
        assert f"tensors from {trained}/{stage}/checkpoint" in said(run)


def test_stage_2_starts_from_stage_1_with_a_new_projection(loader, trained):
    parts = [f"model.language.weights={trained}/pretrain_language/checkpoint"]
    made = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage1/checkpoint", *parts)
    model, _ = made.stage2(new_projection=True)
    before, _ = made.stage1()
    np.testing.assert_array_equal(model.qformer.query_tokens.numpy(), before.qformer.query_tokens.numpy())
    with pytest.raises(UserError, match=r"lacks tensors of the model.*language_proj"):
        made.stage2(new_projection=False)


def test_tokenizers_come_with_the_weights_and_not_from_another_data_sets_text(loader, trained):
    """The digits' texts have other words, and a data set without files has none at all."""
    stage1, stage2 = (f"model.weights={trained}/pretrain_stage{stage}/checkpoint" for stage in (1, 2))
    language = f"model.language.weights={trained}/pretrain_language/checkpoint"
    for dataset in (NO_DATA, FEW):
        for tokenizer in (
            loader(*dataset, stage1).qformer_tokenizer(),
            loader(*dataset, stage2).language_tokenizer(),
            loader(*dataset, stage1, language).language_tokenizer(),
        ):
            assert tokenizer.decode(tokenizer.tokens("which digit is left of")) == "which digit is left of"
            assert tokenizer.vocab_size < 30


def test_without_weights_the_data_sets_text_makes_the_tokenizer(loader):
    tokenizer = loader(*FEW).qformer_tokenizer()
    assert tokenizer.family == "bert" and "purple" in tokenizer.decode(tokenizer.tokens("a purple two"))
    with pytest.raises(UserError, match="image folder /no/where does not exist"):
        loader(*NO_DATA).qformer_tokenizer()


def test_a_tokenizer_of_another_family_is_refused(trained, run):
    cfg = compose_config(["task=caption", "model=tiny_t5", f"model.weights={trained}/pretrain_stage2/checkpoint"])
    with pytest.raises(UserError, match="is of the family 'opt', not 't5'"):
        ModelLoader.of_run(cfg, run).language_tokenizer()


def test_weights_of_another_image_size_are_told(loader, trained, run):
    weights = f"model.weights={trained}/pretrain_stage1/checkpoint"
    made = loader(*NO_DATA, weights)
    own = made.cfg.vision.image_size
    made.stage1()
    assert "note:" not in said(run)
    loader(*NO_DATA, weights, f"model.vision.image_size={2 * own}").stage1()
    assert f"note: the image encoder's weights are of {own} pixels" in said(run)
    assert f"to evaluate what was trained at {own}, set it to {own}" in said(run)


def test_a_frozen_part_without_weights_is_named(loader, trained):
    with pytest.raises(UserError, match=r"^model.vision.frozen=true"):
        loader(*FEW).stage1()
    with pytest.raises(UserError, match=r"^model.language.frozen=true"):
        loader(*FEW, f"model.weights={trained}/pretrain_stage1/checkpoint").stage2(new_projection=True)


def test_a_part_that_is_not_frozen_may_be_new(loader):
    model, _ = loader(*FEW, "model.vision.frozen=false").stage1()
    assert not frozen(model.vision)


def test_an_encoder_trained_in_stage_1_is_what_later_stages_freeze(loader, trained, tmp_path, small):
    """Its weights are in stage 1's checkpoint, whatever `model.vision.weights` still says."""
    given = f"model.vision.weights={trained}/pretrain_vision/checkpoint"
    words = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage1/checkpoint").qformer_tokenizer()
    trainable = build_stage1(compose_config(small).model, vocab_size=words.vocab_size)
    save_checkpoint(tmp_path / "c1", trainable, kind="pretrain_stage1", step=1, tokenizers={"qformer": words})

    language = f"model.language.weights={trained}/pretrain_language/checkpoint"
    made = loader(*NO_DATA, f"model.weights={tmp_path}/c1", given, language)
    stage2, language_words = made.stage2(new_projection=True)
    expected = trainable.vision.state_dict()
    origin = made.frozen_origin("vision", "language")
    assert frozen(stage2.vision) and origin["vision"] == str(tmp_path / "c1")

    tokenizers = {"language": language_words}
    save_checkpoint(tmp_path / "c2", stage2, kind="pretrain_stage2", step=1, tokenizers=tokenizers, frozen_origin=origin)
    again, _ = loader(*NO_DATA, f"model.weights={tmp_path}/c2").stage2(new_projection=False)
    for model in (stage2, again):
        for name, tensor in model.vision.state_dict().items():
            np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), err_msg=name)


def test_a_language_model_goes_on_from_its_weights(loader, trained):
    folder = trained / "pretrain_language/checkpoint"
    model, tokenizer = loader(*NO_DATA, f"model.language.weights={folder}").language()
    assert tokenizer.family == "opt" and not frozen(model)
    before = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    load_checkpoint(folder, model, prefix="language.")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name], err_msg=name)


# from BERT


@pytest.fixture
def bert(loader, tmp_path):
    """`bert(change)` -> a folder with the BERT that the small Q-Former is made for, after a change of its tensors."""

    def write(change=lambda arrays: arrays, **config):
        model, _ = loader(*FEW, "model.vision.frozen=false").stage1()
        arrays = {}
        for name, parameter in model.named_parameters():
            found = BERT.to_theirs(name)
            if found and "query_ffn" not in name:  # a copy of the text's
                array = parameter.numpy() + 1  # unlike the start of any other model
                arrays[found[0]] = np.ascontiguousarray(array.T) if found[1] is Change.transpose else array
        for name in ("embeddings.word_embeddings.weight", "cls.predictions.bias"):
            arrays[name] = arrays[name][:-1]  # BERT has no [DEC]
        folder = tmp_path / "bert"
        folder.mkdir(exist_ok=True)
        save_file(change(arrays), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return f"model.qformer.weights={folder}"

    return write


def test_stage_1_starts_from_a_bert(loader, bert, trained, run):
    eye = f"model.vision.weights={trained}/pretrain_vision/checkpoint"
    start = bert()
    arrays = load_file(start.partition("=")[2] + "/model.safetensors")
    paddle.seed(5)
    model, tokenizer = loader(*FEW, start, eye).stage1()
    ours = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    words = ours["qformer.text.word_embeddings.weight"]
    np.testing.assert_array_equal(words[:-1], arrays["embeddings.word_embeddings.weight"])
    assert len(words) == tokenizer.vocab_size and np.abs(words[-1]).max() < 0.5  # drawn, while BERT's are around 1
    np.testing.assert_array_equal(
        ours["qformer.layers.0.query_ffn.fc1.weight"], arrays["encoder.layer.0.intermediate.dense.weight"].T
    )
    assert frozen(model.vision) and not frozen(model.qformer)
    text = said(run)
    assert "11 not in it (not in BERT; new)" in text and "2 adapted (1 rows are new)" in text and "(BERT) are used" in text


@pytest.fixture
def stage2(trained):
    return f"model.weights={trained}/pretrain_stage2/checkpoint"


def test_what_reads_questions_comes_from_stage_1_and_all_else_from_stage_2(loader, trained, run, stage2):
    stage1 = f"model.qformer.weights={trained}/pretrain_stage1/checkpoint"
    model, questions, words = loader(*NO_DATA, stage2, stage1).answering()
    assert (questions.family, words.family) == ("bert", "opt") and questions.tokens("a red two") != words.tokens("a red two")
    plain, _ = loader(*NO_DATA, stage2).stage2(new_projection=False)
    first, _ = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage1/checkpoint").stage1()
    before, start = dict(plain.named_parameters()), dict(first.named_parameters())
    for name, parameter in model.named_parameters():
        reads = name.startswith("qformer.text.") or "text_ffn" in name
        np.testing.assert_array_equal(parameter.numpy(), (start if reads else before)[name].numpy(), err_msg=name)
    new = {name for name, _ in model.named_parameters()} - before.keys()
    assert new == {name for name in start if (name.startswith("qformer.text.") and "head_" not in name) or "text_ffn" in name}
    assert f"loaded {len(new)} tensors from {trained}/pretrain_stage1/checkpoint" in said(run)


def test_what_reads_questions_may_come_from_a_bert(loader, bert, run, stage2):
    model, _, _ = loader(*FEW, stage2, bert()).answering()
    stage1, _ = loader(*FEW, "model.vision.frozen=false", f"model.qformer.weights={run.folder.parent}/bert").stage1()
    found, expected = model.qformer.layers[0].text_ffn.fc1.weight, stage1.qformer.layers[0].text_ffn.fc1.weight
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert "1 adapted (1 rows are new)" in said(run)


def test_what_reads_questions_is_told_or_asked_for(loader, trained, run, stage2):
    with pytest.raises(UserError, match=r"set model.qformer.weights to weights of stage 1 .* or model.missing=initialise"):
        loader(*FEW, stage2).answering()
    with pytest.raises(UserError, match="holds an image encoder, but nothing that reads texts"):
        loader(*FEW, stage2, f"model.qformer.weights={trained}/pretrain_vision/checkpoint").answering()
    model, questions, _ = loader(*FEW, stage2, "model.missing=initialise").answering()
    assert model.qformer.text.word_embeddings.weight.shape[0] == questions.vocab_size  # of the data set's words
    assert "starts random, and has to be trained" in said(run)


def test_a_bert_without_a_head_is_told(loader, bert, run):
    start = bert(lambda arrays: {name: array for name, array in arrays.items() if not name.startswith("cls.")})
    loader(*FEW, start, "model.vision.frozen=false").stage1()
    assert "5 not in it (no language-model head there; new)" in said(run)


def lacking(name):
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def deeper(arrays):
    return arrays | {name.replace("layer.0.", "layer.1."): array for name, array in arrays.items() if ".layer.0." in name}


@pytest.mark.parametrize(
    ("change", "overrides", "sentence"),
    [
        (lambda arrays: arrays, ["model.qformer.depth=2"], r"model\.qformer\.depth is 2, but 1 there"),
        (deeper, [], r"model\.qformer\.depth is 1, but 2 there"),
        (lambda arrays: arrays, ["model.qformer.width=28"], r"model\.qformer\.width is 28, but 24 there"),
        (lambda arrays: arrays, ["model.qformer.num_heads=2"], r"model\.qformer\.num_heads is 2, but 4 there"),
        (
            lacking("encoder.layer.0.attention.self.key.bias"),
            [],
            r"lacks tensors of the model: qformer\.layers\.0\.attention\.key\.bias$",
        ),
        (lambda arrays: arrays, ["model.qformer.max_positions=40"], r"position_embeddings.* is \[64, 24\] .* \[40, 24\]"),
    ],
)
def test_another_bert_is_refused(loader, bert, change, overrides, sentence):
    start = bert(change, num_attention_heads=4)
    with pytest.raises(UserError, match=sentence):
        loader(*FEW, start, "model.vision.frozen=false", *overrides).stage1()


# parts that weights lack


def test_stage_1_from_weights_that_read_no_text_has_to_be_asked_for(loader, trained, run):
    whole = [*FEW, f"model.weights={trained}/pretrain_stage2/checkpoint"]
    sentence = r"lacks tensors of the model: .*; set model\.missing=initialise to begin with random ones and train them$"
    with pytest.raises(UserError, match=sentence):
        loader(*whole).stage1()
    model, _ = loader(*whole, "model.missing=initialise").stage1()
    expected, _ = loader(*whole).stage2(new_projection=False)
    np.testing.assert_array_equal(model.qformer.query_tokens.numpy(), expected.qformer.query_tokens.numpy())
    assert all(parameter._is_initialized() for parameter in model.parameters())
    assert float(model.temp) == pytest.approx(0.07)
    assert "(model.missing=initialise: starts random, and has to be trained)" in said(run)


def test_that_advice_is_given_only_where_it_helps(loader, trained, tmp_path):
    """A stage 2 has nothing that could be random."""
    checkpoint = tmp_path / "c"
    model, words = loader(*NO_DATA, f"model.weights={trained}/pretrain_stage2/checkpoint").stage2(new_projection=False)
    del model.qformer.query_tokens
    parts = {part: f"{trained}/pretrain_{part}/checkpoint" for part in ("vision", "language")}
    save_checkpoint(checkpoint, model, kind="pretrain_stage2", step=1, tokenizers={"language": words}, frozen_origin=parts)
    with pytest.raises(UserError, match=r"lacks tensors of the model: qformer\.query_tokens$"):
        loader(*NO_DATA, f"model.weights={checkpoint}").stage2(new_projection=False)


# files of other systems

VISION = ["width=16", "mlp_width=26", "depth=2", "num_heads=2"]
LAVIS = [*(f"model.vision.{key}" for key in (*VISION, "image_size=12", "patch_size=4"))]
QFORMER = ["width=18", "depth=3", "num_heads=3", "num_queries=5", "vocab_size=37"]
LAVIS += [f"model.qformer.{key}" for key in (*QFORMER, "mlp_width=30", "max_positions=11", "embed_dim=14")]


def test_a_lavis_file_is_a_model_as_any_other(loader, run):
    given = [*NO_DATA, f"model.weights={PARITY}/lavis/stage1.pth", *LAVIS, "task=pretrain_stage1", "task.max_txt_len=11"]
    given += ["task.validation.captions=false"]
    made = loader(*given)
    model = made.stage1_model(0)
    assert frozen(model.vision) and model.ln_vision._epsilon == 1e-5
    assert made.frozen_origin("vision") == {"vision": f"{PARITY}/lavis/stage1.pth"}
    assert f"135 of 138 tensors of {PARITY}/lavis/stage1.pth (LAVIS) are used; 1 left out" in said(run)
    with pytest.raises(UserError, match=r"vision_proj\.\w+ is \[.*14\] in the file, but \[.*20\] in the model"):
        loader(*given, "model.qformer.embed_dim=20").stage1_model(0)


SHORT = ["task.max_new_tokens=5", "task.min_new_tokens=1"]
OPT = ["width=15", "depth=2", "num_heads=3", "mlp_width=28", "max_positions=24"]
HF = [*(f"model.vision.{key}" for key in (*VISION, "image_size=15", "patch_size=5", "key_bias=true"))]
HF += [*(f"model.qformer.{key}" for key in (*QFORMER[:4], "mlp_width=34")), *(f"model.language.{key}" for key in OPT)]


def test_words_behind_the_models_vocabulary_are_left_out(loader, run):
    """Hugging Face has added a token for images to the published ones."""
    given = [*NO_DATA, f"model.weights={PARITY}/huggingface/opt", *HF, *SHORT]
    whole, cut = (
        loader(*given, f"model.language.vocab_size={size}").stage2_model(0, new_projection=False).language for size in (41, 40)
    )
    ours, theirs = (model.opt.embeddings.word_embeddings.weight.numpy() for model in (cut, whole))
    assert ours.shape == (40, 15)
    np.testing.assert_array_equal(ours, theirs[:40])
    assert "1 adapted ([41, 15] to [40, 15])" in said(run)
    with pytest.raises(UserError, match=r"word_embeddings\.weight is \[41, 15\] in the file, but \[42, 15\] in the model"):
        loader(*given, "model.language.vocab_size=42").stage2_model(0, new_projection=False)


@pytest.mark.parametrize(("weights", "eps"), [("huggingface/opt", 1e-6), (None, 1e-5)])
def test_a_task_computes_as_its_weights_origin_does(run, small, weights, eps):
    given = [f"model.weights={PARITY / weights}", *HF, *SHORT] if weights else small
    for more, expected in (([], eps), (["model.ln_vision_eps=1e-3"], 1e-3)):
        task = TASKS.get("caption")(compose_config(["task=caption", *NO_DATA, *given, *more]), run)
        assert task.cfg.model.ln_vision_eps == expected


# an encoder of the user's own, as README.md adds one


class MeanVit(nn.Layer):
    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.width, self.patch_size = width, patch_size
        self.colour = nn.Linear(3, width)

    def forward(self, image_BCHW):
        means_BCP = nn.functional.avg_pool2d(image_BCHW, self.patch_size).flatten(start_axis=2)
        patch_BPD = self.colour(means_BCP.transpose([0, 2, 1]))
        return paddle.concat([patch_BPD.mean(axis=1, keepdim=True), patch_BPD], axis=1)

    def adapters(self):
        return {}


def test_an_encoder_of_the_users_own(run, small, tmp_path, monkeypatch):
    monkeypatch.setitem(VISION_ENCODERS._builders, "mean_vit", lambda cfg: MeanVit(cfg.width, cfg.patch_size))

    def config(*overrides):
        cfg = compose_config(["task=pretrain_stage1", *small, *FEW, *overrides])
        cfg.model.vision.kind = "mean_vit"
        return cfg

    eye = MeanVit(24, 16)
    cfg = follow_source(config().model, None)
    extra = {"settings": settings_of(cfg, ["vision"])}
    save_checkpoint(tmp_path / "eye", PatchClassifier(eye, {"digit": 11}), kind="pretrain_vision", step=1, extra=extra)
    model, words = ModelLoader.of_run(config(f"model.vision.weights={tmp_path}/eye"), run).stage1()
    np.testing.assert_array_equal(model.vision.colour.weight.numpy(), eye.colour.weight.numpy())

    for freed in (False, True):
        if freed:
            model.vision.is_frozen = False
            for parameter in model.vision.parameters():
                parameter.stop_gradient = False
        extra = {"settings": settings_of(cfg, ["vision", "qformer"])}
        origin = {} if freed else {"vision": f"{tmp_path}/eye"}
        folder = tmp_path / f"whole{freed}"
        save_checkpoint(
            folder, model, kind="pretrain_stage1", step=1, extra=extra, tokenizers={"qformer": words}, frozen_origin=origin
        )
        loader = ModelLoader.of_run(config(f"model.weights={folder}"), run)
        loader.weights.require_same_shape()
        again, _ = loader.stage1()
        for name, parameter in again.named_parameters():
            np.testing.assert_array_equal(parameter.numpy(), dict(model.named_parameters())[name].numpy(), err_msg=name)
