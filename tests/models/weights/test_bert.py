"""A BERT folder into the Q-Former: every name counts."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from blip2x.errors import UserError
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.weights.bert import load_bert

WIDTH, MLP, WORDS, POSITIONS = 12, 20, 9, 7
HEAD = ["text.head_bias"] + [f"text.head_{part}.{kind}" for part in ("norm", "transform") for kind in ("bias", "weight")]


def build(**changes) -> QFormer:
    paddle.seed(0)
    sizes = {"num_queries": 3, "width": WIDTH, "depth": 2, "num_heads": 2, "mlp_width": MLP, "cross_attention_every": 2}
    sizes |= {"vision_width": 10, "dropout": 0.0, "vocab_size": WORDS + 1, "max_positions": POSITIONS}
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

    add("bert.embeddings.word_embeddings.weight", WORDS, width)
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
    add("cls.predictions.bias", WORDS)
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


def numbers(qformer: QFormer) -> dict[str, np.ndarray]:
    return {name: parameter.numpy().copy() for name, parameter in qformer.named_parameters()}


@pytest.mark.parametrize("old_names", [False, True])
def test_values_and_layouts(folder, old_names):
    arrays, qformer = bert(old_names=old_names), build()
    report = load_bert(folder(arrays), qformer)
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
    assert not any("token_type" in name for name in report.loaded)


def test_queries_feed_forward_starts_as_the_text_s(folder):
    qformer = build()
    load_bert(folder(bert()), qformer)
    ours = numbers(qformer)
    copies = [name for name in ours if ".query_ffn." in name]
    assert len(copies) == 2 * 6
    for name in copies:
        np.testing.assert_array_equal(ours[name], ours[name.replace("query_ffn", "text_ffn")])


def test_new_word_keeps_its_row(folder):
    qformer, arrays = build(), bert()
    before = numbers(qformer)
    load_bert(folder(arrays), qformer)
    after = numbers(qformer)
    words = after["text.word_embeddings.weight"]
    np.testing.assert_array_equal(words[:WORDS], arrays["bert.embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(words[WORDS], before["text.word_embeddings.weight"][WORDS])
    np.testing.assert_array_equal(after["text.head_bias"], [*arrays["cls.predictions.bias"], 0])


def test_report_says_what_is_new_and_what_is_left_out(folder):
    qformer = build()
    before = numbers(qformer)
    report = load_bert(folder(bert()), qformer)
    new = {name for name in before if "cross_attention" in name or name == "query_tokens"}
    assert set(report.missing) == new and set(report.missing.values()) == {"not in BERT; new"}
    assert set(report.loaded) == before.keys() - new
    assert sorted(report.dropped) == [
        "cls.predictions.decoder.bias",
        "cls.predictions.decoder.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
        "embeddings.position_ids",
        "embeddings.token_type_embeddings.weight",
        "pooler.dense.bias",
        "pooler.dense.weight",
    ]
    for name, array in numbers(qformer).items():
        assert np.array_equal(array, before[name]) == (name in new), name


def test_without_a_language_model_head_it_stays_and_the_report_says_so(folder):
    """A file of the bare encoder, whose names lack the outer "bert." as well."""
    arrays = {name.removeprefix("bert."): array for name, array in bert().items() if not name.startswith("cls.")}
    qformer = build()
    before = numbers(qformer)
    report = load_bert(folder(arrays), qformer)
    random = [name for name, why in report.missing.items() if why == "the file has no language-model head; it stays random"]
    assert sorted(random) == HEAD
    after = numbers(qformer)
    for name in HEAD:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize(
    ("arrays", "changes", "sentence"),
    [
        (bert(depth=1), {}, r"lacks encoder\.layer\.1\.\S+: it is no BERT of 2 layers"),
        (bert(depth=3), {}, r"has encoder\.layer\.2\.\S+, which the Q-Former has no place for: its depth is 2"),
        (bert(width=16), {}, r"word_embeddings\.weight makes \[9, 16\], but the Q-Former's \S+ is \[10, 12\]"),
        (bert(), {"vocab_size": WORDS - 1}, r"word_embeddings\.weight makes \[9, 12\], but .* is \[8, 12\]"),
        (bert(), {"max_positions": 5}, r"position_embeddings\.weight makes \[7, 12\], but .* is \[5, 12\]"),
        (bert(), {"mlp_width": 28}, r"intermediate\.dense\.weight makes \[12, 20\], but .* is \[12, 28\]"),
    ],
)
def test_another_bert_is_refused_and_nothing_is_set(folder, arrays, changes, sentence):
    qformer = build(**changes)
    before = numbers(qformer)
    with pytest.raises(UserError, match=sentence):
        load_bert(folder(arrays), qformer)
    for name, array in numbers(qformer).items():
        np.testing.assert_array_equal(array, before[name])


def test_number_of_heads_is_compared_with_the_config(folder):
    with pytest.raises(UserError, match=r"config\.json: num_attention_heads is 3, but the configured Q-Former has 2"):
        load_bert(folder(bert(), num_attention_heads=3), build())
    load_bert(folder(bert(), num_attention_heads=2), build())
