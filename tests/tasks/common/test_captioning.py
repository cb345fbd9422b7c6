"""Texts of a batch are those that each prompt gets alone, however long its neighbours are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

import blip2x
from blip2x.data.tokenize import train_tokenizer
from blip2x.generation.settings import GenerationSettings
from blip2x.tasks.common.captioning import write_texts

FOLDERS = Path(__file__).parents[2] / "parity" / "huggingface"
PROMPTS = ["which", "which colour has the digit", "the left one"]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_prompts_of_unequal_length_do_not_touch_each_other(family):
    model, _ = blip2x.load(FOLDERS / family)
    tokenizer = train_tokenizer(PROMPTS, family)
    pixels = np.random.default_rng(0).standard_normal((3, 3, 15, 15)).astype(np.float32)
    with paddle.no_grad():
        query_BQD = model.network.encode(paddle.to_tensor(pixels))
    settings = GenerationSettings(max_new_tokens=8, min_new_tokens=8, num_beams=2)
    together = write_texts(model.network, tokenizer, query_BQD, PROMPTS, settings)
    for row, prompt in enumerate(PROMPTS):
        alone = write_texts(model.network, tokenizer, query_BQD[row : row + 1], [prompt], settings)
        assert [text.text for text in together[row]] == [text.text for text in alone[0]]
        assert together[row][0].score == pytest.approx(alone[0][0].score, abs=1e-5)
