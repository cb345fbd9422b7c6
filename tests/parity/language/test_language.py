"""OPT and T5 against Hugging Face transformers 4.57.6: weights in, logits and decoded texts out (see make_reference.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.weights.checkpoint import load_checkpoint

HERE = Path(__file__).parent
REFERENCE = np.load(HERE / "reference.npz")
CASES = json.loads((HERE / "cases.json").read_text())


def opt(folder: str = "opt") -> OptLanguageModel:
    model = OptLanguageModel(width=24, depth=2, num_heads=3, mlp_width=40, vocab_size=41, max_positions=32, dropout=0.1)
    load_checkpoint(HERE / folder, nn.LayerDict({"language": model}))
    model.eval()
    return model


def t5(exact_gelu: bool = True) -> T5LanguageModel:
    model = T5LanguageModel(
        width=20,
        encoder_depth=2,
        decoder_depth=2,
        num_heads=4,
        head_width=6,
        mlp_width=36,
        vocab_size=41,
        relative_buckets=8,
        relative_max_distance=12,
        exact_gelu=exact_gelu,
        dropout=0.1,
    )
    load_checkpoint(HERE / "t5", nn.LayerDict({"language": model}))
    model.eval()
    return model


MODELS = {"opt": opt, "t5": t5}


def arrays(*names: str) -> list[paddle.Tensor]:
    return [paddle.to_tensor(REFERENCE[name]) for name in names]


def test_opt_logits():
    logits = opt()(*arrays("opt_embeds", "mask")).numpy()
    tokens = REFERENCE["mask"].astype(bool)  # what padding predicts means nothing
    np.testing.assert_allclose(logits[tokens], REFERENCE["opt_logits"][tokens], atol=5e-5)


@pytest.mark.parametrize(("exact", "name"), [(True, "t5_logits"), (False, "t5_tanh_logits")])
def test_t5_logits(exact, name):
    logits = t5(exact)(*arrays("t5_embeds", "mask", "decoder_ids", "decoder_mask")).numpy()
    np.testing.assert_allclose(logits, REFERENCE[name], atol=5e-5)


def test_the_two_gelus_are_told_apart():
    assert np.abs(REFERENCE["t5_logits"] - REFERENCE["t5_tanh_logits"]).max() > 2e-4


@pytest.mark.parametrize("name", MODELS)
def test_decoded_texts_and_scores(name):
    model = MODELS[name]()
    checked = 0
    for number, case in enumerate(CASES):
        if case["model"] != name:
            continue
        settings = GenerationSettings(**case["settings"])
        out = generate(
            model, tuple(arrays(f"{name}_embeds", "mask")), settings, eos_id=case["eos"], pad_id=1, start_id=model.start_id
        )
        for ours, theirs in zip(out.ids, REFERENCE[f"ids_{number}"], strict=True):
            assert until(ours, case["eos"]) == until(theirs, case["eos"]), case
        if settings.num_beams > 1:
            np.testing.assert_allclose(out.scores, REFERENCE[f"scores_{number}"], atol=5e-4, err_msg=str(case))
        checked += 1
    assert checked > 50


def until(ids: np.ndarray, eos: int) -> list[int]:
    """Up to the end token: what fills the row behind it differs by mode."""
    tokens = ids.tolist()
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("folder", ["opt_bfloat16_shards", "opt_bfloat16_torch"])
def test_half_precision_files_round_to_eight_bits(folder):
    half, whole = opt(folder), opt()
    for rounded, exact in zip(half.parameters(), whole.parameters(), strict=True):
        np.testing.assert_allclose(rounded.numpy(), exact.numpy(), rtol=2**-8)
        assert (rounded.numpy().view("u4") & 0xFFFF == 0).all()
