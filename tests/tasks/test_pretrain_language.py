"""A reader that has never seen an image."""

from __future__ import annotations

import json
import math

import pytest

from blip2x.data.scenes.painter import SceneImage
from blip2x.data.tokenize import TextTokenizer


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
def test_it_learns_from_texts_alone(run_task, monkeypatch, model):
    def look(self):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(SceneImage, "open", look)
    metrics, folder = run_task("pretrain_language", f"model={model}", "task.max_steps=30")
    found = losses(folder)
    assert found[-1] < 0.7 * found[0]
    assert metrics == {"loss": found[-1], "perplexity": math.exp(found[-1])}
    tokenizer = TextTokenizer.load(folder / "checkpoint/tokenizers/language")
    assert found[0] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.25)  # it began with knowing nothing


def test_it_goes_on_from_weights_and_their_tokenizer(run_task, demo):
    before = demo("model=tiny_opt")
    weights = before.checkpoint("pretrain_language")
    _, folder = run_task("pretrain_language", f"model.language.weights={weights}", "dataset.seed=1", "optim.lr=1e-4")
    assert losses(folder)[0] < before.results["pretrain_language"]["loss"] + 0.5
    tokenizer = "tokenizers/language/tokenizer.json"
    assert (folder / "checkpoint" / tokenizer).read_text() == (weights / tokenizer).read_text()
