"""Hugging Face folders of OPT and T5 into our models: every name counts. Right numbers are tests/parity's matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from blip2x.errors import UserError
from blip2x.models.language._common import is_initialized
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.weights.huggingface_language import is_huggingface_folder, load_huggingface_language

FOLDERS = Path(__file__).resolve().parents[2] / "parity" / "language"
OPT = {"width": 24, "depth": 2, "num_heads": 3, "mlp_width": 40, "vocab_size": 41, "max_positions": 32, "dropout": 0.0}
T5 = {"width": 20, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 4, "head_width": 6, "mlp_width": 36, "vocab_size": 41}
T5 |= {"relative_buckets": 8, "relative_max_distance": 12, "exact_gelu": True, "dropout": 0.0}
EMBEDDING = "model.decoder.embed_tokens.weight"


def build(kind: str, **changes):
    return OptLanguageModel(**{**OPT, **changes}) if kind == "opt" else T5LanguageModel(**{**T5, **changes})


@pytest.fixture
def altered(tmp_path):
    """`altered(kind, tensors=..., config=...)` -> a copy of the tiny model's folder after the changes."""

    def write(kind, tensors=lambda arrays: arrays, **config):
        save_file(tensors(load_file(FOLDERS / kind / "model.safetensors")), tmp_path / "model.safetensors")
        known = json.loads((FOLDERS / kind / "config.json").read_text())
        merged = {name: value for name, value in {**known, **config}.items() if value is not ...}  # ...: left out
        (tmp_path / "config.json").write_text(json.dumps(merged))
        return tmp_path

    return write


def without(*names):
    return lambda arrays: {name: array for name, array in arrays.items() if name not in names}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_every_parameter_is_loaded(kind):
    model = build(kind)
    report = load_huggingface_language(FOLDERS / kind, model)
    assert sorted(report.loaded) == sorted(name for name, _ in model.named_parameters())
    assert report.missing == {}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_model_built_without_memory_gets_it_here(kind):
    with paddle.LazyGuard():
        lazy = build(kind)
    assert not any(p._is_initialized() for p in lazy.parameters())
    load_huggingface_language(FOLDERS / kind, lazy)
    eager = build(kind)
    load_huggingface_language(FOLDERS / kind, eager)
    assert is_initialized(lazy)
    for ours, theirs in zip(lazy.named_parameters(), eager.named_parameters(), strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_array_equal(ours[1].numpy(), theirs[1].numpy())


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("opt", "lm_head.weight", "tied to the word embedding"),
        ("t5", "encoder.embed_tokens.weight", "the same as shared.weight"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", "attention to the encoder has no pos"),
    ],
)
def test_what_is_left_out_has_a_reason(altered, kind, name, reason):
    same = EMBEDDING if kind == "opt" else "shared.weight"
    report = load_huggingface_language(altered(kind, lambda arrays: {**arrays, name: arrays[same].copy()}), build(kind))
    assert report.dropped[name].startswith(reason)


def test_opt_without_the_outer_prefix(altered):
    plain = altered("opt", lambda arrays: {name.removeprefix("model."): array for name, array in arrays.items()})
    report = load_huggingface_language(plain, build("opt"))
    assert len(report.loaded) == len(build("opt").parameters())


def test_opt_with_another_head_is_refused(altered):
    folder = altered("opt", lambda arrays: {**arrays, "lm_head.weight": arrays[EMBEDDING] + 1})
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the word embedding"):
        load_huggingface_language(folder, build("opt"))


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("opt", without("model.decoder.layers.1.fc1.bias"), r"lacks model\.decoder\.layers\.1\.fc1\.bias$"),
        ("opt", without(EMBEDDING), r"has no model\.decoder\.embed_tokens\.weight: it is no OPT"),
        ("t5", without("lm_head.weight", "shared.weight"), r"lacks lm_head\.weight, shared\.weight$"),
        ("t5", lambda a: {**a, "decoder.extra": np.ones(1, "f4")}, r"has tensors that the model lacks: decoder\.extra$"),
        ("t5", lambda a: {**a, "shared.weight": a["shared.weight"][1:]}, r"shared\.weight makes \[40, 20\], but .* \[41, 20\]"),
    ],
)
def test_names_and_shapes_are_strict_and_nothing_is_set(altered, kind, change, sentence):
    model = build(kind)
    before = [p.numpy().copy() for p in model.parameters()]
    with pytest.raises(UserError, match=sentence):
        load_huggingface_language(altered(kind, change), model)
    for parameter, array in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(parameter.numpy(), array)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("opt", {"model_type": "gpt2"}, "model_type is 'gpt2', but the configured model has 'opt'"),
        ("opt", {"num_attention_heads": 6}, "num_attention_heads is 6, but the configured model has 3"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ("opt", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ("t5", {"num_heads": 5}, "num_heads is 5"),
        ("t5", {"relative_attention_max_distance": ...}, "relative_attention_max_distance is 128, but .* 12"),
        ("t5", {"feed_forward_proj": "relu"}, "gated feed_forward_proj is False"),
        ("t5", {"tie_word_embeddings": ...}, "tie_word_embeddings is True"),
    ],
)
def test_what_shapes_cannot_tell_is_compared_with_the_config(altered, kind, changes, sentence):
    with pytest.raises(UserError, match=rf"config\.json: {sentence}"):
        load_huggingface_language(altered(kind, **changes), build(kind))


def test_another_kind_of_folder_is_one_sentence(tmp_path):
    assert not is_huggingface_folder(tmp_path) and is_huggingface_folder(FOLDERS / "opt")
    with pytest.raises(UserError, match=r"no language model at .* with config\.json"):
        load_huggingface_language(tmp_path, build("opt"))
