"""Answers are those of each question alone, and an image is encoded once for all questions about it."""

from __future__ import annotations

from types import SimpleNamespace

import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.data.samples import QuestionSample
from blip2x.data.tokenize import clean_question, train_tokenizer
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import set_eval_mode
from blip2x.models.qformer.attention import watch_queries
from blip2x.models.weights.describe import follow_source
from blip2x.tasks.common import answering as answering_module
from blip2x.tasks.common.answering import Answering
from blip2x.tasks.common.inputs import build_source

SCENES = 5
SETTINGS = GenerationSettings(num_beams=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def parts(small):
    """Config, a model that learned nothing, its tokenizer and questions about five scenes, those about one not in a row."""
    words = ["task=vqa_zeroshot", "model=tiny_opt", *small, "task.eval_batch_size=3", f"dataset.test_scenes={SCENES}"]
    cfg = compose_config(words)
    cfg.model = follow_source(cfg.model, None)
    questions = sorted(build_source(cfg).questions("eval"), key=lambda sample: (sample.question, sample.question_id))
    tokenizer = train_tokenizer([f"{sample.question} {sample.answers[0]}" for sample in questions], "opt")
    paddle.seed(0)
    model = build_stage2(cfg.model, vocab_size=tokenizer.vocab_size)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # the usual start is so small that all pictures would get the same answer
            parameter.set_value(5 * parameter)
    set_eval_mode(model)
    return SimpleNamespace(cfg=cfg, model=model, tokenizer=tokenizer, questions=questions)


def answering(parts, run, *, group=True, queries=None):
    return Answering(
        parts.cfg, run, parts.model, parts.tokenizer, parts.questions, settings=SETTINGS, prompt="say: {} it is",
        encode=parts.model.soft_prompt, queries=queries, group=group,
    )  # fmt: skip


def test_questions_that_share_an_image_are_answered_as_each_alone(parts, run, encoded):
    together, alone = answering(parts, run), answering(parts, run, group=False)
    found = together.answer()
    assert together.images_encoded == sum(encoded) == SCENES
    encoded.clear()
    expected = alone.answer()
    assert alone.images_encoded == sum(encoded) == len(parts.questions) > 3 * SCENES
    assert [question for question, _ in found] == [question for question, _ in expected] == parts.questions
    for (question, row), (_, other) in zip(found, expected, strict=True):
        assert (row["question_id"], row["prediction"]) == (question.question_id, other["prediction"])
        assert row["score"] == pytest.approx(other["score"], abs=1e-4)
    assert len({row["prediction"] for _, row in found}) > 3
    assert "prompt: " + repr(f"say: {clean_question(parts.questions[0].question)} it is") in run.console.file.getvalue()


def test_queries_are_made_from_each_questions_own_image_and_question(parts, run):
    """As a fine-tuned model makes them, whose Q-Former reads the question."""
    seen = []

    def queries(feature_NQD, questions):
        assert len(feature_NQD) == len(questions) <= 3
        seen.extend(zip(feature_NQD.numpy(), questions, strict=True))
        return feature_NQD

    answering(parts, run, queries=queries).answer()
    assert sorted(question.question_id for _, question in seen) == sorted(q.question_id for q in parts.questions)
    by_image = {question.image_id: feature for feature, question in seen}
    assert len(by_image) == SCENES and len({feature.tobytes() for feature in by_image.values()}) == SCENES
    assert all(feature.tobytes() == by_image[question.image_id].tobytes() for feature, question in seen)


def test_any_number_of_ranks_answers_alike_and_counts_all_images(parts, over_ranks):
    def work(run):
        task = answering(parts, run)
        return task.answer(), task.images_encoded

    ((alone, _),) = over_ranks(1, work)
    for found, images in over_ranks(2, work):
        assert images == SCENES
        assert [row["prediction"] for _, row in found] == [row["prediction"] for _, row in alone]


def test_ranks_share_the_prompts_that_are_answered_without_images(parts, over_ranks, monkeypatch):
    written, write = [], answering_module.write_texts
    monkeypatch.setattr(answering_module, "write_texts", lambda *words: written.append(words[3]) or write(*words))
    (alone,) = over_ranks(1, lambda run: answering(parts, run).answer_blind())
    batches = list(written)
    written.clear()
    assert len(batches) > 2 and len(set(alone.values())) > 1
    assert over_ranks(2, lambda run: answering(parts, run).answer_blind()) == [alone, alone]
    assert sorted(written) == sorted(batches)


def test_the_prompt_has_the_cleaned_question(parts, run):
    task = answering(parts, run)
    sample = QuestionSample(0, None, "Is it RED?!", ("a",), "t", "t", 0)
    assert task._asked(sample) == "say: is it red? it is"


@pytest.mark.parametrize("reads_questions", [False, True])
def test_where_the_queries_looked_at_each_image_comes_with_its_first_question(parts, run, reads_questions):
    qformer, kept = parts.model.qformer, []

    def encode(encoded_BPV):
        patch_BPV = parts.model.ln_vision(encoded_BPV)
        kept.extend(patch_BPV.numpy())
        return patch_BPV if reads_questions else parts.model.language_proj(qformer.encode_image(patch_BPV)[0])

    def queries(feature_N, _):
        return parts.model.language_proj(qformer.encode_image(feature_N)[0]) if reads_questions else feature_N

    task = Answering(
        parts.cfg, run, parts.model, parts.tokenizer, parts.questions, settings=SETTINGS, prompt="{}", encode=encode,
        queries=queries,
    )  # fmt: skip
    found = task.answer()
    first = {}
    for question, row in found:
        first.setdefault(question.image_id, row)
    assert [row for _, row in found if "shares" in row] == list(first.values()) and len(first) == SCENES
    with paddle.no_grad(), watch_queries(qformer) as seen:  # images were encoded in the order of their first questions
        qformer.encode_image(paddle.to_tensor(kept))
    for row, share_QP in zip(first.values(), seen[0].numpy(), strict=True):
        assert row["shares"] == pytest.approx(share_QP, abs=1e-5)
