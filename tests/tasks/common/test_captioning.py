"""Texts of a batch are those that each prompt gets alone; validation is the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest

import blip2x
from blip2x.config.compose import compose_config
from blip2x.data.loader import build_loader
from blip2x.data.tokenize import train_tokenizer
from blip2x.engine.batches import to_tensors
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze, set_eval_mode
from blip2x.models.weights.describe import follow_source
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.tasks.common import captioning
from blip2x.tasks.common.captioning import HeldOutCaptions, stage2_collate, validation_settings, write_texts
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import eval_transform

FOLDERS = Path(__file__).parents[2] / "parity" / "huggingface"
PROMPTS = ["which", "which colour has the digit", "the left one"]
IMAGES = 7


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


@pytest.fixture
def parts(small):
    """`parts(model, *overrides)` -> config, a model that learned nothing, its tokenizer and seven samples."""

    def build(name, *overrides):
        sizes = [word for word in small if not (name == "tiny_t5" and "language.depth" in word)]
        words = [
            f"model={name}",
            *sizes,
            "task.eval_batch_size=2",
            f"dataset.test_scenes={IMAGES}",
            "task.prompt=a",
            *overrides,
        ]
        cfg = compose_config(["task=pretrain_stage2", *words])
        cfg.model = follow_source(cfg.model, None)
        samples = build_source(cfg).captions("eval")
        tokenizer = train_tokenizer([text for sample in samples for text in sample.captions], name.removeprefix("tiny_"))
        paddle.seed(0)
        model = build_stage2(cfg.model, vocab_size=tokenizer.vocab_size)
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the usual start is so small that all pictures would get the same text
                parameter.set_value(5 * parameter)
        freeze(model.language)
        set_eval_mode(model)
        return cfg, model, tokenizer, samples

    return build


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_t5"])
def test_the_held_out_loss_is_per_token_and_a_blind_one_is_computed_once(parts, run, encoded, monkeypatch, name):
    cfg, model, tokenizer, samples = parts(name, "task.validation.captions=false")
    blind, text_loss = [], Stage2Objective.text_loss

    def watched(self, query_BQD, batch):
        blind.append(query_BQD is None)
        return text_loss(self, query_BQD, batch)

    monkeypatch.setattr(Stage2Objective, "text_loss", watched)
    settings = validation_settings(cfg.task.validation)
    held_out = HeldOutCaptions(cfg, run, model, tokenizer, samples, settings=settings, limit=None)
    found = held_out.validate()
    assert sum(encoded) == IMAGES and sum(blind) == 4  # batches
    assert held_out.validate() == found
    assert sum(encoded) == 2 * IMAGES and sum(blind) == 4 and len(blind) == 12

    dataset = cfg.dataset
    (whole,) = build_loader(
        samples, stage2_collate(cfg.task, tokenizer, eval_transform(cfg)), batch_size=IMAGES, shuffle=False, seed=cfg.seed,
        num_workers=0, on_bad_image=dataset.on_bad_image,
    )  # fmt: skip
    with paddle.no_grad():
        tensors = to_tensors(whole)
        seen = text_loss(Stage2Objective(model), model.encode(tensors["image_BCHW"]), tensors)
        unseen = text_loss(Stage2Objective(model), None, tensors)
    expected = {"eval_loss": float(seen), "blind_eval_loss": float(unseen)}
    assert found == pytest.approx(expected, rel=1e-5) and found["eval_loss"] != found["blind_eval_loss"]


def test_a_validation_is_the_same_on_any_number_of_ranks(parts, over_ranks, monkeypatch):
    cfg, model, tokenizer, samples = parts("tiny_opt", "task.validation.max_images=5", "task.validation.max_new_tokens=6")
    scored = []

    def score(run, samples, captions, names):
        scored.append([(sample.image_id, caption) for sample, caption in zip(samples, captions, strict=True)])
        return {"CIDEr": 1.0}

    monkeypatch.setattr(captioning, "validation_scores", score)

    def work(run):
        settings = validation_settings(cfg.task.validation)
        held_out = HeldOutCaptions(cfg, run, model, tokenizer, samples, settings=settings, limit=5)
        return held_out.validate(), held_out.rows

    ((alone, rows),) = over_ranks(1, work)
    assert len({row["caption"] for row in rows}) > 1
    assert [image_id for image_id, _ in scored[0]] == [row["image_id"] for row in rows] == [s.image_id for s in samples[:5]]
    for ranks in (2, 4, 8):
        for found, others in over_ranks(ranks, work):
            assert found == pytest.approx(alone, rel=1e-5)
            assert [row["caption"] for row in others] == [row["caption"] for row in rows]
    assert all(part == scored[0] for part in scored)


def test_scores_of_captions_are_said_with_the_first_few(parts, run):
    _, _, _, samples = parts("tiny_opt")
    captions = [sample.captions[-1] for sample in samples]
    found = captioning.validation_scores(run, samples, captions, ["ROUGE_L", "CIDEr"])
    assert found["ROUGE_L"] == pytest.approx(1) and found["CIDEr"] > 1
    said = run.console.file.getvalue()
    assert f"7 captions  ROUGE_L 1.000  CIDEr {found['CIDEr']:.3f}" in said
    assert captions[2] in said and captions[3] not in said
