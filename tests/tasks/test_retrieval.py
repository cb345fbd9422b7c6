"""Retrieval: what is re-ranked equals looking at every pair, on any number of ranks; fine-tuning begins from stage 1."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from blip2x.config.compose import compose_config
from blip2x.config.task import trains
from blip2x.data.tokenize import train_tokenizer
from blip2x.errors import UserError
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.freeze import set_eval_mode
from blip2x.models.memory.predict import Layout
from blip2x.models.weights.describe import follow_source
from blip2x.models.weights.manifest import read_manifest
from blip2x.tasks import retrieval
from blip2x.tasks.checkup.examined import looked_at
from blip2x.tasks.checkup.memory import prediction_of, texts_of
from blip2x.tasks.common import stage1_training
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import eval_transform
from blip2x.tasks.retrieval import Search

IMAGES = 6
RECALLS = [f"{way}_recall@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def parts(small):
    """A config, a model that learned nothing, its tokenizer, six samples, and [images, texts] of ITC and ITM of all pairs."""
    data = ["dataset.train_scenes=1", f"dataset.test_scenes={IMAGES}", "task.eval_batch_size=4", "task.pair_batch_size=5"]
    cfg = compose_config(["task=retrieval", *small, "model.qformer.depth=2", *data])
    cfg.model = follow_source(cfg.model, None)
    samples = build_source(cfg).captions("eval")
    tokenizer = train_tokenizer([text for sample in samples for text in sample.captions], "bert")
    paddle.seed(0)
    model = build_stage1(cfg.model, vocab_size=tokenizer.vocab_size)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # the usual start is so small that all pairs would get the same score
            parameter.set_value(5 * parameter)
    set_eval_mode(model)
    texts = [text for sample in samples for text in sample.captions]
    with paddle.no_grad():
        images = paddle.to_tensor(np.stack([eval_transform(cfg)(sample.image.open()) for sample in samples]))
        patch, _, image, _ = model.image_features(images)
        ids, mask = map(paddle.to_tensor, tokenizer.encode(texts, max_length=35))
        itc = np.einsum("nqe,me->nmq", image.numpy(), model.text_features(ids, mask).numpy()).max(axis=-1)
        itm = [model.itm_logits(paddle.stack([patch[n]] * len(texts)), ids, mask)[:, 1].numpy() for n in range(IMAGES)]
    return cfg, model, tokenizer, samples, itc, np.stack(itm)


def brute_force(itc, itm, k_test, owner):
    """Recalls, and ranks of the first right ones, when all candidates are sorted by (on the shortlist, score)."""
    found, ranks = {}, {}
    right = np.arange(len(itc))[:, None] == owner
    for way, similarity, logit, same in (("i2t", itc, itm, right), ("t2i", itc.T, itm.T, right.T)):
        firsts = []
        for sim, match, own in zip(similarity, logit, same, strict=True):
            listed = np.argsort(-sim)[:k_test]
            order = sorted(range(len(sim)), key=lambda c: (c not in listed, -(match[c] + sim[c]) if c in listed else -sim[c]))
            firsts.append(1 + next(place for place, c in enumerate(order) if own[c]))
        ranks[way] = firsts
        found |= {f"{way}_recall@{k}": np.mean(np.array(firsts) <= k) for k in (1, 5, 10)}
    return found, ranks


@pytest.mark.parametrize("k_test", [1, 3, 1000])
def test_re_ranking_equals_sorting_every_candidate(parts, run, k_test, encoded, monkeypatch):
    monkeypatch.setattr("blip2x.tasks.common.pictures.MOST_PICTURES", 1)  # those that the report shows are kept all the same
    cfg, model, tokenizer, samples, itc, itm = parts
    cfg = replace(cfg, task=replace(cfg.task, k_test=k_test))
    search = Search(cfg, run, model, tokenizer, samples)
    metrics = search()
    assert encoded == [4, 2]
    owner = np.array([place for place, sample in enumerate(samples) for _ in sample.captions])
    expected, ranks = brute_force(itc, itm, k_test, owner)
    assert {name: metrics[name] for name in RECALLS} == pytest.approx(expected)
    assert metrics["r_mean"] == pytest.approx(np.mean([expected[name] for name in RECALLS]))
    alone, _ = brute_force(itc, 0 * itm, 1000, owner)
    assert {name: metrics[f"itc_{name}"] for name in RECALLS} == pytest.approx(alone)
    assert expected != alone or k_test == 1  # matching has a say
    assert metrics["chance"] == pytest.approx(1 / IMAGES) and "held_out/itc_r_mean" in metrics
    assert "ci95_low_r_mean" in metrics and "held_out/ci95_low_r_mean" not in metrics  # a single image
    for scope in ("", "seen/"):
        for name in [f"{prefix}{name}" for prefix in ("", "itc_") for name in (*RECALLS, "r_mean")]:
            low, high = (metrics[f"{scope}ci95_{end}_{name}"] for end in ("low", "high"))
            assert 0 <= low <= metrics[f"{scope}{name}"] <= high <= 1

    images, texts = search.rows[:IMAGES], search.rows[IMAGES:]
    assert [row["rank"] for row in images] == ranks["i2t"] and [row["rank"] for row in texts] == ranks["t2i"]
    for row, sample, place in zip(images, samples, range(IMAGES), strict=True):
        scored = [entry["score"] for entry in row["retrieved_texts"] if entry["score"] is not None]
        assert len(scored) == min(k_test, 10) and scored == sorted(scored, reverse=True)
        best = row["retrieved_texts"][0]
        assert best["right"] == (best["text"] in sample.captions) == (row["rank"] == 1)
        assert min(abs((itm + itc)[place] - best["score"])) < 1e-5 and row["image"]
    assert all((run.folder / entry["image"]).is_file() for row in texts for entry in row["retrieved_images"])
    assert {entry["image_id"] for entry in texts[0]["retrieved_images"]} == {sample.image_id for sample in samples}


def test_any_number_of_ranks_finds_the_same_from_memory_and_from_a_file(parts, over_ranks, encoded, tmp_path):
    cfg, model, tokenizer, samples, *_ = parts

    def search(ranks, memory):
        own = replace(cfg, task=replace(cfg.task, k_test=3, patch_memory_gb=memory))

        def work(run):
            search = Search(own, run, model, tokenizer, samples)
            return search(), search.rows

        return over_ranks(ranks, work)

    ((alone, rows),) = search(1, 1.0)
    for ranks, memory in ((3, 0.0), (8, 1.0)):
        encoded.clear()
        (first, listed), *others = search(ranks, memory)
        assert all(found == first for found, _ in others) and not any(rows for _, rows in others)
        assert first == pytest.approx(alone) and sum(encoded) == IMAGES
        assert [row["rank"] for row in listed] == [row["rank"] for row in rows]
    assert {path.name for path in tmp_path.iterdir()} <= {"images"}  # no patches are left


@pytest.mark.parametrize(("clean", "expected"), [(True, ["a red two", "blue"]), (False, ["A Red two!", "blue."])])
def test_texts_are_cleaned_where_the_config_says_so(parts, run, monkeypatch, clean, expected):
    cfg, model, tokenizer, samples, *_ = parts
    seen = []
    monkeypatch.setattr(retrieval.Texts, "of", lambda captions, *_: seen.extend(captions) or 1 / 0)
    own = replace(cfg, task=replace(cfg.task, clean_texts=clean))
    with pytest.raises(ZeroDivisionError):
        Search(own, run, model, tokenizer, [replace(samples[0], captions=("A Red two!", "blue."))])()
    assert seen == [expected]


def test_fine_tuning_trains_the_image_encoder_and_then_searches(run_task, trained, small, watch_training, validations):
    weights = trained / "pretrain_stage1/checkpoint"
    models = watch_training(stage1_training)
    command = [*small, f"model.weights={weights}", "task.train=true", "model.vision.frozen=false", "task.k_test=4"]
    steps = ["task.batch_size=8", "task.max_steps=2", "task.max_epochs=null", "task.log_every=1"]
    metrics, folder = run_task("retrieval", *command, *steps, "task.validation.captions=false", "logger=wandb_offline")
    before, after = models
    saved = load_file(weights / "model.safetensors")
    for name, array in before.items():
        if name in saved:
            np.testing.assert_array_equal(array, saved[name], err_msg=name)
    assert any(name.startswith("vision.") and not np.array_equal(before[name], after[name]) for name in before)
    assert read_manifest(folder / "checkpoint")["tensors"].keys() == before.keys()
    (validated,) = validations(folder)
    assert not [name for name in validated if name.startswith("ci95")]
    assert {f"itc_{name}" for name in RECALLS} <= metrics.keys()
    for name in RECALLS:  # their captions are short and left as they are, so that a validation says the same of contrast
        assert metrics[f"itc_{name}"] == pytest.approx(validated[name])
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) > 24 and (folder / rows[0]["image"]).is_file()
    tables = {
        path.name.rsplit("_", 2)[0]: path for path in folder.glob("wandb/offline-run-*/files/media/table/retrieval/*.json")
    }
    assert json.loads(tables["retrieved_texts"].read_text())["columns"][:3] == ["image", "name", "retrieved_texts"]
    assert json.loads(tables["retrieved_images"].read_text())["columns"][:3] == ["text", "retrieved_images", "found/1"]
    assert (folder / "report.html").is_file()


def test_weights_without_stage_1_are_refused(trained, small):
    start = ["task=retrieval", *small, f"model.weights={trained}/pretrain_stage2/checkpoint"]
    with pytest.raises(
        UserError, match="is a checkpoint of pretrain_stage2, but task=retrieval needs one of pretrain_stage1 or"
    ):
        retrieval.Retrieval.check(compose_config(start))


def test_only_fine_tuning_trains_and_takes_stage_1s_memory():
    def prediction(of, *overrides):
        quoted = ",".join(f"'{word}'" for word in ["model.vision.frozen=false", "task.max_steps=1", *overrides])
        words = ["task=doctor", f"task.of={of}", f"task.overrides=[{quoted}]", "dataset.train_scenes=8"]
        (cfg,) = (wanted.cfg for wanted in looked_at(compose_config(words).task).values())
        return prediction_of(cfg, Layout.of(cfg, 1), texts_of(cfg))[0] if trains(cfg.task) else None

    tuned = prediction("retrieval", "task.train=true")
    assert tuned == prediction("pretrain_stage1", "task.contrast_steps=0") and tuned.peak > 0
    assert prediction("retrieval") is None


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        ("task.k_test=0", "task.k_test must be at least 1, got 0"),
        ("task.patch_memory_gb=-1", "task.patch_memory_gb must be at least 0"),
        ("task.eval_max_txt_len=2", "task.eval_max_txt_len must be at least 3"),
        ("task.eval_max_txt_len=65", "task.eval_max_txt_len=65 is more than model.qformer.max_positions=64"),
        ("task.pair_batch_size=0", "task.pair_batch_size must be at least 1"),
    ],
)
def test_mistakes_are_found_at_start_up(mistake, sentence):
    with pytest.raises(UserError, match=sentence):
        compose_config(["task=retrieval", mistake])
