"""OPT, T5 and BERT as Hugging Face names them, into our models: every name counts. Right numbers are tests/parity's matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file, save_file

from blip2x.errors import UserError
from blip2x.models.language._common import is_initialized
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.weights.checkpoint import LoadReport, fill, load_checkpoint
from blip2x.models.weights.source import Source, open_source

FOLDERS = Path(__file__).resolve().parents[3] / "parity" / "language"


def numbers(model: nn.Layer) -> dict[str, np.ndarray]:
    return {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}


def left_out(source: Source) -> dict[str, str]:
    return {row.theirs: row.reason for row in source.coverage if row.ours is None}


# OPT and T5

OPT = {"width": 24, "depth": 2, "num_heads": 3, "mlp_width": 40, "vocab_size": 41, "max_positions": 32, "dropout": 0.0}
T5 = {"width": 20, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4, "head_width": 6, "mlp_width": 36, "vocab_size": 41}
T5 |= {"relative_buckets": 8, "relative_max_distance": 12, "exact_gelu": True, "dropout": 0.0}
WORDS = "model.decoder.embed_tokens.weight"


def build(kind: str, **changes) -> nn.LayerDict:
    model = OptLanguageModel(**{**OPT, **changes}) if kind == "opt" else T5LanguageModel(**{**T5, **changes})
    return nn.LayerDict({"language": model})


@pytest.fixture
def altered(tmp_path):
    """`altered(kind, tensors)` -> a copy of the tiny model's folder after the change."""

    def write(kind, tensors=lambda arrays: arrays):
        save_file(tensors(load_file(FOLDERS / kind / "model.safetensors")), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((FOLDERS / kind / "config.json").read_text())
        return tmp_path

    return write


def without(*names):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_every_parameter_is_loaded(kind):
    model = build(kind)
    report = load_checkpoint(FOLDERS / kind, model)
    assert sorted(report.loaded) == sorted(name for name, _ in model.named_parameters())
    assert report.missing == report.dropped == report.adapted == {}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_model_built_without_memory_gets_it_here(kind):
    with paddle.LazyGuard():
        lazy = build(kind)
    assert not any(p._is_initialized() for p in lazy.parameters())
    load_checkpoint(FOLDERS / kind, lazy)
    eager = build(kind)
    load_checkpoint(FOLDERS / kind, eager)
    assert is_initialized(lazy)
    ours, theirs = numbers(lazy), numbers(eager)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("opt", "lm_head.weight", "tied to the word embedding"),
        ("t5", "encoder.embed_tokens.weight", "the same as shared.weight"),
        ("t5", "decoder.embed_tokens.weight", "the same as shared.weight"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "attention to the encoder has no pos"),
    ],
)
def test_what_is_left_out_has_a_reason(altered, kind, name, reason):
    same = WORDS if kind == "opt" else "shared.weight"
    folder = altered(kind, lambda arrays: {**arrays, name: arrays[same].copy()})
    source = open_source(folder)
    assert left_out(source).keys() == {name} and left_out(source)[name].startswith(reason)
    assert f"1 left out ({left_out(source)[name]})" in source.summary()
    model = build(kind)
    assert len(load_checkpoint(folder, model).loaded) == len(model.parameters())


def test_opt_without_the_outer_prefix(altered):
    plain = altered("opt", lambda arrays: {name.removeprefix("model."): array for name, array in arrays.items()})
    ours, theirs = build("opt"), build("opt")
    assert len(load_checkpoint(plain, ours).loaded) == len(ours.parameters())
    load_checkpoint(FOLDERS / "opt", theirs)
    for name, array in numbers(theirs).items():
        np.testing.assert_array_equal(numbers(ours)[name], array, err_msg=name)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_opt_with_another_head_is_refused(altered, prefix):
    def change(arrays):
        arrays = {name.replace("model.", prefix): array for name, array in arrays.items()}
        return {**arrays, "lm_head.weight": arrays[WORDS.replace("model.", prefix)] + 1}

    with pytest.raises(UserError, match=r"lm_head\.weight differs from .*embed_tokens\.weight, to which it is tied in our mo"):
        open_source(altered("opt", change))


def test_opt_with_a_head_that_differs_in_the_last_word_only_is_refused(altered):
    def change(arrays):
        head = arrays[WORDS].copy()
        head[-1, -1] += 1e-3
        return {**arrays, "lm_head.weight": head}

    with pytest.raises(UserError, match=r"lm_head\.weight differs from"):
        open_source(altered("opt", change))


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("opt", without("model.decoder.layers.1.fc1.bias"), r"lacks .*: language\.opt\.decoder\.layers\.1\.linear1\.bias$"),
        ("opt", without(WORDS), r"holds no weights that blip2x knows \(model\.decoder\.embed_positions"),
        ("t5", without("lm_head.weight", "shared.weight"), r"lacks .*: language\.lm_head\.weight, language\.shared\.weight$"),
        ("t5", lambda a: {**a, "decoder.extra": np.ones(1, "f4")}, r"has tensors that .* T5's .* do not have: decoder\.extra$"),
        ("opt", lambda a: {**a, "model.decoder.extra": np.ones(1, "f4")}, r"do not have: model\.decoder\.extra$"),
        (
            "opt",
            lambda a: {**a, "model.decoder.layers.2.fc1.bias": np.ones(40, "f4")},
            r"has tensors that the model lacks: language\.opt\.decoder\.layers\.2\.linear1\.bias$",
        ),
        (
            "t5",
            lambda a: {**a, "shared.weight": a["shared.weight"][1:]},
            r"shared\.weight: language\.shared\.weight is \[40, 20\] in the file, but \[41, 20\] in the model",
        ),
        (
            "opt",
            lambda a: {**a, "model.decoder.layers.0.fc1.weight": a["model.decoder.layers.0.fc1.weight"].T.copy()},
            r"fc1\.weight: \S+linear1\.weight is \[40, 24\] in the file, but \[24, 40\] in the model",
        ),
    ],
)
def test_names_and_shapes_are_strict_and_nothing_is_set(altered, kind, change, sentence):
    model = build(kind)
    before = numbers(model)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(altered(kind, change), model)
    for name, array in numbers(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_a_folder_without_weights_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no weights in .*: put the files of the Hugging Face repository there .*config\.json"):
        load_checkpoint(tmp_path, build("opt"))


# BERT into a Q-Former

WIDTH, MLP, VOCABULARY, POSITIONS = 12, 20, 9, 7
HEAD = ["text.head_bias"] + [f"text.head_{part}.{kind}" for part in ("norm", "transform") for kind in ("bias", "weight")]
GROWING = ["qformer.text.word_embeddings.weight", "qformer.text.head_bias"]
NEW = [("qformer.query_tokens", "not in BERT; new"), ("qformer.text.head_", "no head there; new")]
NEW += [(f"qformer.layers.{i}.cross_attention.", "not in BERT; new") for i in range(3)]


def build_qformer(**changes) -> QFormer:
    paddle.seed(0)
    sizes = {"num_queries": 3, "width": WIDTH, "depth": 2, "num_heads": 2, "mlp_width": MLP, "cross_attention_every": 2}
    sizes |= {"vision_width": 10, "dropout": 0.0, "vocab_size": VOCABULARY + 1, "max_positions": POSITIONS}
    return QFormer(**{**sizes, **changes})


def bert(depth: int = 2, *, old_names: bool = False, width: int = WIDTH) -> dict[str, np.ndarray]:
    """As bert-base-uncased is stored: with a pooler, segments and two heads."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        arrays[name] = generator.standard_normal(shape).astype(np.float32)

    def dense(name: str, outputs: int, inputs: int) -> None:
        add(f"{name}.weight", outputs, inputs)
        add(f"{name}.bias", outputs)

    def norm(name: str) -> None:
        add(f"{name}.{'gamma' if old_names else 'weight'}", width)
        add(f"{name}.{'beta' if old_names else 'bias'}", width)

    add("bert.embeddings.word_embeddings.weight", VOCABULARY, width)
    add("bert.embeddings.position_embeddings.weight", POSITIONS, width)
    add("bert.embeddings.token_type_embeddings.weight", 2, width)
    arrays["bert.embeddings.position_ids"] = np.arange(POSITIONS)[None]
    norm("bert.embeddings.LayerNorm")
    for index in range(depth):
        layer = f"bert.encoder.layer.{index}"
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", width, width)
        dense(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", MLP, width)
        dense(f"{layer}.output.dense", width, MLP)
        norm(f"{layer}.output.LayerNorm")
    dense("bert.pooler.dense", width, width)
    add("cls.predictions.bias", VOCABULARY)
    dense("cls.predictions.transform.dense", width, width)
    norm("cls.predictions.transform.LayerNorm")
    arrays["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"].copy()
    arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"].copy()
    dense("cls.seq_relationship", 2, width)
    return arrays


@pytest.fixture
def folder(tmp_path):
    """`folder(arrays)` -> a folder with these tensors."""

    def write(arrays, **config):
        save_file(arrays, tmp_path / "model.safetensors")
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def load_bert(folder: Path, qformer: QFormer) -> LoadReport:
    source = open_source(folder)
    holder = nn.LayerDict({"qformer": qformer})
    return fill(holder, source.tensors, str(folder), allow_missing=NEW, grows=GROWING)


@pytest.mark.parametrize("old_names", [False, True])
def test_values_and_layouts(folder, old_names):
    arrays, qformer = bert(old_names=old_names), build_qformer()
    load_bert(folder(arrays), qformer)
    ours, layer = numbers(qformer), "bert.encoder.layer.1"
    norm = "LayerNorm.gamma" if old_names else "LayerNorm.weight"
    for name, expected in {
        "embeddings_norm.weight": arrays[f"bert.embeddings.{norm}"],
        "text.position_embeddings.weight": arrays["bert.embeddings.position_embeddings.weight"],
        "text.head_transform.weight": arrays["cls.predictions.transform.dense.weight"].T,
        "text.head_norm.weight": arrays[f"cls.predictions.transform.{norm}"],
        "layers.1.attention.query.weight": arrays[f"{layer}.attention.self.query.weight"].T,
        "layers.1.attention.key.bias": arrays[f"{layer}.attention.self.key.bias"],
        "layers.1.attention.value.weight": arrays[f"{layer}.attention.self.value.weight"].T,
        "layers.1.attention.out.weight": arrays[f"{layer}.attention.output.dense.weight"].T,
        "layers.1.attention.norm.weight": arrays[f"{layer}.attention.output.{norm}"],
        "layers.1.text_ffn.fc1.weight": arrays[f"{layer}.intermediate.dense.weight"].T,
        "layers.1.text_ffn.fc2.bias": arrays[f"{layer}.output.dense.bias"],
        "layers.1.text_ffn.norm.weight": arrays[f"{layer}.output.{norm}"],
    }.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


def test_queries_feed_forward_starts_as_the_text_s(folder):
    qformer = build_qformer()
    load_bert(folder(bert()), qformer)
    ours = numbers(qformer)
    copies = [name for name in ours if ".query_ffn." in name]
    assert len(copies) == 2 * 6
    for name in copies:
        np.testing.assert_array_equal(ours[name], ours[name.replace("query_ffn", "text_ffn")])


def test_new_word_keeps_its_row(folder):
    qformer, arrays = build_qformer(), bert()
    before = numbers(qformer)
    report = load_bert(folder(arrays), qformer)
    after = numbers(qformer)
    words = after["text.word_embeddings.weight"]
    np.testing.assert_array_equal(words[:VOCABULARY], arrays["bert.embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(words[VOCABULARY], before["text.word_embeddings.weight"][VOCABULARY])
    np.testing.assert_array_equal(after["text.head_bias"], [*arrays["cls.predictions.bias"], 0])
    assert report.adapted == dict.fromkeys(GROWING, "1 rows are new")


def test_report_says_what_is_new_and_the_source_what_is_left_out(folder):
    qformer = build_qformer()
    before = numbers(qformer)
    report = load_bert(folder(bert()), qformer)
    new = {name for name in before if "cross_attention" in name or name == "query_tokens"}
    assert report.missing == {f"qformer.{name}": "not in BERT; new" for name in new}
    assert set(report.loaded) == {f"qformer.{name}" for name in before.keys() - new}
    assert left_out(open_source(folder(bert()))) == {
        "cls.predictions.decoder.bias": "the same as the head's bias",
        "cls.predictions.decoder.weight": "tied to the word embeddings",
        "cls.seq_relationship.bias": "BERT's next-sentence head",
        "cls.seq_relationship.weight": "BERT's next-sentence head",
        "bert.embeddings.position_ids": "counted, not learned",
        "bert.embeddings.token_type_embeddings.weight": "a caption is one segment",
        "bert.pooler.dense.bias": "BERT's sentence classifier",
        "bert.pooler.dense.weight": "BERT's sentence classifier",
    }
    for name, array in numbers(qformer).items():
        assert np.array_equal(array, before[name]) == (name in new), name


def test_without_a_language_model_head_it_stays_and_the_report_says_so(folder):
    """A file of the bare encoder, whose names lack the outer "bert." as well."""
    arrays = {name.removeprefix("bert."): array for name, array in bert().items() if not name.startswith("cls.")}
    qformer = build_qformer()
    before = numbers(qformer)
    report = load_bert(folder(arrays), qformer)
    random = [name.removeprefix("qformer.") for name, why in report.missing.items() if why == "no head there; new"]
    assert sorted(random) == HEAD
    after = numbers(qformer)
    for name in HEAD:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_a_head_that_is_not_the_embeddings_is_refused(folder, name):
    arrays = bert()
    arrays[name] = arrays[name] + 1
    with pytest.raises(UserError, match=rf"tensor {name} differs from .*, to which it is tied in our model"):
        open_source(folder(arrays))


@pytest.mark.parametrize("old_names", [False, True])
def test_a_name_that_is_there_twice_is_refused(folder, old_names):
    arrays = bert()
    name = "bert.embeddings.LayerNorm.weight"
    twice = name.replace("weight", "gamma") if old_names else name.removeprefix("bert.")
    with pytest.raises(UserError, match=r"is a second qformer\.embeddings_norm\.weight; there has to be one"):
        open_source(folder({**arrays, twice: arrays[name]}))


@pytest.mark.parametrize(
    ("arrays", "changes", "sentence"),
    [
        (bert(depth=1), {}, r"lacks tensors of the model: qformer\.layers\.1\.attention"),
        (bert(depth=3), {}, r"has tensors that the model lacks: qformer\.layers\.2\.attention"),
        (bert(width=16), {}, r"LayerNorm\.weight: \S+embeddings_norm\.weight is \[16\] in the file, but \[12\]"),
        (bert(), {"vocab_size": VOCABULARY - 1}, r"cls\.predictions\.bias: \S+ is \[9\] in the file, but \[8\]"),
        (bert(), {"max_positions": 5}, r"position_embeddings\.weight: \S+ is \[7, 12\] .* \[5, 12\]"),
        (bert(), {"mlp_width": 28}, r"intermediate\.dense\.weight: \S+ is \[12, 20\] .* \[12, 28\]"),
        (
            without("bert.encoder.layer.1.attention.self.key.bias")(bert()),
            {},
            r"lacks .*: qformer\.layers\.1\.attention\.key\.b",
        ),
        (
            {**bert(), "bert.encoder.layer.0.extra": np.ones(1, "f4")},
            {},
            r"BERT's .* do not have: bert\.encoder\.layer\.0\.extra$",
        ),
    ],
)
def test_another_bert_is_refused_and_nothing_is_set(folder, arrays, changes, sentence):
    qformer = build_qformer(**changes)
    before = numbers(qformer)
    with pytest.raises(UserError, match=sentence):
        load_bert(folder(arrays), qformer)
    for name, array in numbers(qformer).items():
        np.testing.assert_array_equal(array, before[name])
