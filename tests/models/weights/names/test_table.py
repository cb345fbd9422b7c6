"""Tables of names: rows, both directions, and that each family's has a place for every parameter of our models."""

from __future__ import annotations

import re

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.weights.describe import follow_source
from blip2x.models.weights.names.huggingface import HUGGINGFACE
from blip2x.models.weights.names.language import BERT, OPT, T5
from blip2x.models.weights.names.lavis import LAVIS
from blip2x.models.weights.names.paddlemix import PADDLEMIX
from blip2x.models.weights.names.table import LINEAR, PLAIN, SCALAR, TENSOR, Change, Row, Table, in_out, prefixed
from blip2x.models.weights.stored import StoredTensor

ROWS = (
    Row("blocks.{i}.attn", "ours.{i}.attention", LINEAR),
    Row("norm", "ours.norm", PLAIN),
    Row("norm", "ours.copy", PLAIN),
    Row("a.b", "ours.token", TENSOR),
    Row("temp", "temp", SCALAR),
)
TABLE = Table(ROWS, ((r"head\..*", "no head here"),))


def test_numbers_of_layers_go_over():
    assert TABLE.to_ours("blocks.12.attn.weight") == [("ours.12.attention.weight", Change.transpose)]
    assert TABLE.to_ours("blocks.0.attn.bias") == [("ours.0.attention.bias", Change.none)]
    assert TABLE.to_theirs("ours.12.attention.weight") == ("blocks.12.attn.weight", Change.transpose)


@pytest.mark.parametrize(
    "name",
    ["blocks.x.attn.weight", "blocks.1.attn", "xblocks.1.attn.weight", "blocks.1.attn.weights", "axb", "blocks.1.2.attn.bias"],
)
def test_a_name_counts_as_a_whole(name):
    assert TABLE.to_ours(name) == [] and TABLE.reason(name) is None


def test_one_tensor_may_start_several_of_ours():
    assert TABLE.to_ours("norm.bias") == [("ours.norm.bias", Change.none), ("ours.copy.bias", Change.none)]
    assert TABLE.to_theirs("ours.copy.bias") == TABLE.to_theirs("ours.norm.bias") == ("norm.bias", Change.none)


def test_what_has_no_place_there():
    assert TABLE.to_theirs("ours.other.weight") is None
    assert TABLE.reason("head.weight") == "no head here" and TABLE.reason("my.head.weight") is None


def test_prefixes_and_the_other_layout():
    assert Table(prefixed(ROWS, theirs="x.", ours="y.")).to_ours("x.a.b") == [("y.ours.token", Change.none)]
    assert Table(in_out(ROWS)).to_ours("blocks.3.attn.weight") == [("ours.3.attention.weight", Change.none)]
    assert Table(in_out(ROWS)).to_ours("temp") == [("temp", Change.scalar)]


@pytest.mark.parametrize(
    ("change", "shape", "expected"),
    [
        (Change.none, (2, 3), (2, 3)),
        (Change.transpose, (2, 3), (3, 2)),
        (Change.leading, (3,), (1, 1, 3)),
        (Change.leading, (2, 3), (1, 2, 3)),
        (Change.leading, (1, 2, 3), (1, 2, 3)),
        (Change.scalar, (), (1,)),
        (Change.scalar, (1,), (1,)),
    ],
)
def test_changes_of_layout(change, shape, expected):
    array = np.arange(int(np.prod(shape)), dtype="f4").reshape(shape)
    tensor = change.to_ours(StoredTensor.of("here", array))
    assert tensor.shape == expected == tensor.read().shape
    np.testing.assert_array_equal(tensor.read(), array.T if change is Change.transpose else array.reshape(expected))


# our models


def names(stage: int, model: str) -> list[str]:
    """Of a tiny model's parameters."""
    cfg = follow_source(compose_config([f"model={model}", "model.vision.key_bias=true"]).model, None)
    with paddle.LazyGuard():
        built = build_stage1(cfg, vocab_size=20) if stage == 1 else build_stage2(cfg, vocab_size=20)
    return [name for name, _ in built.named_parameters()]


@pytest.mark.parametrize("table", [HUGGINGFACE, PADDLEMIX], ids=["Hugging Face", "PaddleMIX"])
@pytest.mark.parametrize(("stage", "model"), [(1, "tiny_opt"), (2, "tiny_opt"), (2, "tiny_t5")])
def test_every_parameter_has_a_name_there_and_comes_back(table, stage, model):
    without = {"temp", *(name for name in names(stage, model) if name.startswith("qformer.text.head_"))}
    seen = set()
    for name in names(stage, model):
        found = table.to_theirs(name)
        if table is HUGGINGFACE and name in without:
            assert found is None  # its retrieval models write no captions
            continue
        assert found is not None, name
        theirs, change = found
        assert (name, change) in table.to_ours(theirs) and table.reason(theirs) is None
        assert theirs not in seen
        seen.add(theirs)


@pytest.mark.parametrize(("stage", "model"), [(1, "tiny_opt"), (2, "tiny_opt"), (2, "tiny_t5")])
def test_lavis_has_all_but_the_language_model(stage, model):
    for name in names(stage, model):
        if name.startswith("language."):
            assert LAVIS.to_theirs(name) is None
        else:
            assert LAVIS.to_theirs(name) is not None, name


@pytest.mark.parametrize(
    ("model", "table"), [*(("tiny_opt", table) for table in OPT.values()), ("tiny_t5", T5)], ids=["OPT", "bare OPT", "T5"]
)
def test_language_models_alone(model, table):
    for name in names(2, model):
        found = table.to_theirs(name)
        assert (found is not None) == name.startswith("language."), name
        if found:
            assert table.to_ours(found[0]) == [(name, found[1])]


def test_what_bert_has_not():
    without = {name for name in names(1, "tiny_opt") if name.startswith("qformer.") and BERT.to_theirs(name) is None}
    assert without == {name for name in names(1, "tiny_opt") if "cross_attention" in name or name == "qformer.query_tokens"}


@pytest.mark.parametrize("table", [HUGGINGFACE, PADDLEMIX, LAVIS], ids=["Hugging Face", "PaddleMIX", "LAVIS"])
def test_linear_layers_are_turned_for_pytorch_s_files_only(table):
    for name in names(1, "tiny_opt"):
        found = table.to_theirs(name)
        is_linear = name.endswith("weight") and not re.search(r"norm|ln_|embeddings", name)
        if found:
            assert (found[1] is Change.transpose) == (is_linear and table is not PADDLEMIX), name
