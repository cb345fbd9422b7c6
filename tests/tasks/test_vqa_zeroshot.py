"""Answers to questions, beside what is scored without the image."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from blip2x.errors import UserError
from blip2x.tasks.common import answering


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def prompts(monkeypatch):
    """For each call of the language model: (whether it sees images, the prompts)."""
    found, write_about, write_texts = [], answering.write_about, answering.write_texts

    def about(model, tokenizer, queries, image_B, asked, settings):
        found.append((True, list(asked)))
        return write_about(model, tokenizer, queries, image_B, asked, settings)

    def blind(model, tokenizer, query_BQD, asked, settings):
        assert query_BQD is None
        found.append((False, list(asked)))
        return write_texts(model, tokenizer, query_BQD, asked, settings)

    monkeypatch.setattr(answering, "write_about", about)
    monkeypatch.setattr(answering, "write_texts", blind)
    return found


@pytest.mark.parametrize("model", ["tiny_opt", "tiny_t5"])
def test_a_checkpoint_alone_answers_what_the_pipeline_answered(run_task, demo, encoded, model):
    run = demo(f"model={model}")
    encoded.clear()
    metrics, folder = run_task("vqa_zeroshot", f"model={model}", f"model.weights={run.checkpoint('pretrain_stage2')}")
    assert metrics == run.results["vqa_zeroshot"]
    assert rows(folder) == rows(run.folder / "vqa_zeroshot")
    assert len(rows(folder)) > 24
    assert encoded == [5, 5, 2]  # each image once, however many questions are asked about it
    asked = len(rows(folder))
    assert (metrics["questions"], metrics["images_encoded"]) == (asked, 12)
    assert metrics["questions_per_image_encoded"] == pytest.approx(asked / 12)
    submitted = json.loads((folder / "leaderboard.json").read_text())
    assert submitted == [{"question_id": row["question_id"], "answer": row["prediction"]} for row in rows(folder)]


def test_every_question_is_asked_in_the_prompt_and_blind_ones_once(run_task, demo, prompts):
    stage2 = demo("model=tiny_opt").checkpoint("pretrain_stage2")
    prompts.clear()  # of the demo, if it has just been run
    metrics, folder = run_task("vqa_zeroshot", f"model.weights={stage2}", "task.prompt='{} say:'", "task.blind_baseline=true")
    found = rows(folder)
    seeing = Counter(prompt for sees, asked in prompts for prompt in asked if sees)
    assert seeing == Counter(f"{row['question']} say:" for row in found)
    blind = Counter(prompt for sees, asked in prompts for prompt in asked if not sees)
    assert blind == Counter(seeing.keys())
    assert all(len(asked) <= 5 for _, asked in prompts)
    assert all(len({row["blind"] for row in found if row["question"] == q}) == 1 for q in {row["question"] for row in found})

    commonest = metrics["majority_accuracy"]
    prompts.clear()
    metrics, _ = run_task("vqa_zeroshot", f"model.weights={stage2}", "task.blind_baseline=false")
    assert not any("blind" in name or "majority" in name for name in metrics) and commonest > 0
    assert all(sees for sees, _ in prompts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.lemmatise=true"], "needs spaCy"),
        (["task.answer_rules=okvqa"], "answer_rules"),
    ],
)
def test_what_cannot_be_done_is_told_before_work(run_task, demo, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("blip2x.metrics.lemmatise.find_spec", lambda name: None)
    with pytest.raises(UserError, match=message):
        run_task("vqa_zeroshot", f"model.weights={demo('model=tiny_opt').checkpoint('pretrain_stage2')}", *words)
    assert not (tmp_path / "vqa_zeroshot").exists()
