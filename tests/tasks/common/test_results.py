"""Results of answers and captions: with truth and without, in groups, by type, and the files for evaluation servers."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.errors import UserError
from blip2x.metrics.caption import CaptionScores, caption_scores
from blip2x.registry import TASKS
from blip2x.tasks.common import results
from blip2x.tasks.common.results import answer_results, caption_results, check_questions


class Plain:
    name = "plain"

    def open(self):
        return Image.new("RGB", (8, 8))


def asked(number, answers=("yes",), *, image_id=None, kinds=("is it", "yes/no"), group=""):
    return QuestionSample(
        number, Plain(), f"question {number}?", answers, *kinds, number if image_id is None else image_id, group
    )


def answered(said, questions):
    return [
        (q, {"question_id": q.question_id, "prediction": text, "score": 0.0}) for q, text in zip(questions, said, strict=True)
    ]


def captioned(said, samples):
    rows = [{"image_id": s.image_id, "caption": t, "captions": [t], "score": 0.0} for s, t in zip(samples, said, strict=True)]
    return list(zip(samples, rows, strict=True))


@pytest.fixture(scope="module")
def task():
    """`task(kind, *overrides)` -> config on a data set named "mine"."""
    return functools.cache(lambda kind, *words: compose_config([f"task={kind}", "dataset.name=mine", *words]))


@pytest.fixture
def answers_of(run, task):
    """`answers_of(pairs, *overrides)` -> metrics."""

    def score(pairs, *words, left_out=0, baselines=None):
        cfg = task("vqa_zeroshot", *words)
        return answer_results(run, cfg, pairs, baselines=baselines or {}, images_encoded=len(pairs), left_out=left_out)

    return score


def lines(run):
    return [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]


def test_accuracy_by_type_of_question_and_of_answer_and_by_group(answers_of, run):
    count = ("how many", "number")
    questions = [asked(0), asked(1), asked(2, ("2",), kinds=count), asked(3, ("2",), kinds=count)]
    questions = [replace(q, group="seen" if q.question_id else "held_out") for q in questions]
    blind = dict.fromkeys(range(4), "two")
    found = answers_of(answered(["yes", "no", "two", "3"], questions), baselines={"blind": blind})
    plain = {key: value for key, value in found.items() if "ci95" not in key}
    assert plain == {
        "accuracy": 50,
        "accuracy/question_type/how many": 50,
        "accuracy/question_type/is it": 50,
        "accuracy/answer_type/number": 50,
        "accuracy/answer_type/yes/no": 50,
        "held_out/accuracy": 100,
        "seen/accuracy": pytest.approx(100 / 3),
        "blind_accuracy": 50,
        "blind_accuracy/question_type/how many": 100,
        "blind_accuracy/question_type/is it": 0,
        "blind_accuracy/answer_type/number": 100,
        "blind_accuracy/answer_type/yes/no": 0,
        "held_out/blind_accuracy": 0,
        "seen/blind_accuracy": pytest.approx(200 / 3),
        "questions": 4,
        "images_encoded": 4,
        "questions_per_image_encoded": 1,
    }
    assert found["ci95_low_accuracy"] < 50 < found["ci95_high_accuracy"]
    assert found["ci95_low_accuracy/answer_type/yes/no"] == 0 and "held_out/ci95_low_accuracy" not in found  # of one image
    assert found["seen/ci95_high_accuracy"] == 100 and not any("ci95_low_blind" in key for key in found)
    assert [(row["correct"], row["blind"], row["answer_type"]) for row in lines(run)] == [
        (1, "two", "yes/no"), (0, "two", "yes/no"), (1, "two", "number"), (0, "two", "number"),
    ]  # fmt: skip


def test_a_single_type_is_no_part(answers_of):
    assert not [key for key in answers_of(answered(["yes", "no"], [asked(0), asked(1)])) if "_type/" in key]


def test_the_rules_are_those_of_the_config(answers_of):
    pairs = answered(["Yes"], [asked(0, ("yes",) * 10)])
    found = {rules: answers_of(pairs, f"task.answer_rules={rules}")["accuracy"] for rules in ("vqa", "vqa_lavis", "aokvqa")}
    assert found == {"vqa": 0, "vqa_lavis": 100, "aokvqa": 0}


def test_lemmas_are_scored_and_submitted_and_what_was_written_stays(answers_of, run, monkeypatch):
    monkeypatch.setattr(results, "lemmatise", lambda answers: [answer.removesuffix("s") for answer in answers])
    pairs = answered(["dogs", "cat"], [asked(0, ("dog",)), asked(1, ("cats",))])
    baselines = {"blind": {0: "cats", 1: "cats"}, "majority": {0: "cats", 1: "cats"}}
    found = answers_of(pairs, "task.lemmatise=true", baselines=baselines)
    assert (found["accuracy"], found["blind_accuracy"], found["majority_accuracy"]) == (50, 0, 50)
    assert [(row["prediction"], row["written"], row["blind"]) for row in lines(run)] == [
        ("dog", "dogs", "cat"),
        ("cat", "cat", "cat"),
    ]
    submitted = json.loads((run.folder / "leaderboard.json").read_text())
    assert submitted == [{"question_id": 0, "answer": "dog"}, {"question_id": 1, "answer": "cat"}]


def test_questions_without_truth_are_answered_and_not_scored(answers_of, run):
    found = answers_of(answered(["yes", "no"], [asked(7, ()), asked(8, ())]), baselines={"blind": {7: "a", 8: "a"}})
    assert found == {"questions": 2, "images_encoded": 2, "questions_per_image_encoded": 1}
    assert [(row["correct"], row["answers"]) for row in lines(run)] == [(None, []), (None, [])]
    submitted = json.loads((run.folder / "leaderboard.json").read_text())
    assert submitted == [{"question_id": 7, "answer": "yes"}, {"question_id": 8, "answer": "no"}]
    assert "no score exists: mine has no true answers for eval" in run.console.file.getvalue()


def test_captions_without_truth_are_written_and_not_scored(run, task):
    samples = [CaptionSample(Plain(), (), n) for n in (3, 4)]
    found = caption_results(run, task("caption"), captioned(["a dog", "a cat"], samples), blind="a", left_out=0)
    assert found == {"images": 2} and [row["scores"] for row in lines(run)] == [{}, {}]
    submitted = json.loads((run.folder / "leaderboard.json").read_text())
    assert submitted == [{"image_id": 3, "caption": "a dog"}, {"image_id": 4, "caption": "a cat"}]
    assert "no score exists: mine has no true captions for eval" in run.console.file.getvalue()


@pytest.mark.parametrize(
    ("words", "left_out", "reason"),
    [
        (["dataset.eval_limit=2"], 0, "dataset.eval_limit=2 leaves images out"),
        ([], 3, "3 left out with images that cannot be read"),
    ],
)
def test_what_is_incomplete_is_not_for_a_server(answers_of, run, words, left_out, reason):
    answers_of(answered(["yes"], [asked(0)]), *words, left_out=left_out)
    assert not (run.folder / "leaderboard.json").exists() and (run.folder / "predictions.jsonl").exists()
    assert f"no leaderboard.json was written: {reason}" in run.console.file.getvalue()


@pytest.mark.parametrize("kind", ["caption", "vqa_zeroshot"])
def test_the_report_has_pictures_of_the_best_and_the_worst_of_many(task, run, answers_of, monkeypatch, kind):
    """Also where so many images were evaluated that few copies are kept."""
    monkeypatch.setattr("blip2x.tasks.common.pictures.MOST_PICTURES", 40)
    values = {number: (number * 7919 % 501) / 501 for number in range(501)}
    if kind == "caption":
        scores = CaptionScores(scores={"CIDEr": 0.5}, per_image={"BLEU-1": dict.fromkeys(values, 0.0), "CIDEr": values})
        monkeypatch.setattr(results, "score_captions", lambda *_: scores)
        samples = [CaptionSample(Plain(), ("a",), number) for number in values]
        caption_results(run, task("caption"), captioned(["a"] * 501, samples), blind=None, left_out=0)
    else:
        monkeypatch.setattr(results, "answer_scores", lambda *_: values)
        answers_of(answered(["a"] * 501, [asked(number) for number in values]))
    kept = {row["image_id"] for row in lines(run) if row["image"]}
    assert {path.stem for path in (run.folder / "images").iterdir()} == {str(number) for number in kept}
    ranked, shown = sorted(values, key=values.get), 4 if kind == "caption" else 3
    assert 30 < len(kept) <= 40 and {*ranked[:shown], *ranked[-shown:]} <= kept


def test_groups_of_captions_are_scored_as_sets_of_their_own(run, task):
    """A phrase that is rare in its domain, but not among all images, weighs more in the domain's CIDEr."""
    told = ["a red dog runs", "a red cat sleeps", "a blue bird", "the green tree", "the red tree grows"]
    truth = ["a red dog runs", "a dog sleeps", "a blue bird sings", "the green tree", "the red house grows"]
    domains = ["in-domain", "in-domain", "in-domain", "out-domain", "out-domain"]
    samples = [CaptionSample(Plain(), (text,), n, group) for n, (text, group) in enumerate(zip(truth, domains, strict=True))]
    cfg = task("caption", "task.metrics=[BLEU,CIDEr]")
    found = caption_results(run, cfg, captioned(told, samples), blind=None, left_out=0)

    def alone(chosen):
        return caption_scores({n: told[n] for n in chosen}, {n: (truth[n],) for n in chosen}, ["BLEU", "CIDEr"])

    whole, part = alone(range(5)), alone(range(3))
    for scope, scores in (("", whole.scores), ("in-domain/", part.scores)):
        assert {name: found[f"{scope}{name}"] for name in scores} == pytest.approx(scores)
        assert found[f"{scope}ci95_low_CIDEr"] < found[f"{scope}CIDEr"] < found[f"{scope}ci95_high_CIDEr"]
        assert f"{scope}ci95_low_BLEU-4" not in found
    assert "out-domain/CIDEr" in found
    per_image = whole.per_image["CIDEr"]
    assert abs(found["in-domain/CIDEr"] - sum(per_image[n] for n in range(3)) / 3) > 0.01  # no mean over the whole set's values


def test_several_answers_are_refused_where_the_rules_know_one(task):
    questions = [asked(0), asked(5, ("a", "b"))]
    check_questions(task("vqa_zeroshot"), questions)
    for rules in ("gqa", "gqa_lavis"):
        with pytest.raises(UserError, match=f"answer_rules={rules} compares with one answer .*1 of 2 .*question 5"):
            check_questions(task("vqa_zeroshot", f"task.answer_rules={rules}"), questions)


def test_questions_are_looked_at_before_work(task, monkeypatch):
    source = SimpleNamespace(questions=lambda split: [asked(0), asked(1, ("a", "b"))])
    monkeypatch.setattr("blip2x.tasks.common.task.build_source", lambda cfg: source)
    promised = frozenset(f"model.{part}weights" for part in ("", "vision.", "language."))
    TASKS.get("vqa_zeroshot").check(task("vqa_zeroshot"), promised)
    with pytest.raises(UserError, match="1 of 2 questions have several"):
        TASKS.get("vqa_zeroshot").check(task("vqa_zeroshot", "task.answer_rules=gqa"), promised)


@pytest.mark.parametrize(
    ("command", "splits"),
    [
        ("task=caption task.train=true", ["val"]),
        ("task=retrieval task.train=true", ["val", "eval"]),
        ("task=retrieval", ["eval"]),
        ("task=pretrain_stage1", ["val"]),
        ("task=pretrain_stage2", ["val"]),
        ("task=extract_features task.mode=multimodal task.split=eval", ["eval"]),
        ("task=extract_features task.mode=text task.split=val", ["val"]),
        ("task=extract_features task.mode=image", []),
    ],
)
def test_captions_that_are_needed_and_not_known_are_told_before_work(command, splits):
    cfg = compose_config(command.split())
    samples, task = [CaptionSample(Plain(), (), 0)], TASKS.get(cfg.task.kind)
    for _, split in task.reads(cfg):
        task.check_samples(cfg, split, [CaptionSample(Plain(), ("a cat",), 0)])
        if split in splits:
            with pytest.raises(UserError, match=f" needs true captions, and digits has none for {split}; choose"):
                task.check_samples(cfg, split, samples)
        else:
            task.check_samples(cfg, split, samples)
