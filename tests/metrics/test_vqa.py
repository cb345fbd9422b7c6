"""The official VQA rules by hand-worked cases, each with the quirk that it holds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from blip2x.errors import UserError
from blip2x.metrics.vqa import answer_score, majority_answers, most_common_answers, normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Yes\n", "yes"),
        ("a  Dog and\tthe cat", "dog and cat"),
        ("two", "2"),
        ("None of ten", "0 of 10"),  # "none" counts as a number
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("it's", "it's"),  # the apostrophe is no mark
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("lets see, shes here", "lets see shes here"),  # words in their own right
        ("somebody'd", "somebodyd"),  # a slip in the official table
        ("left-hand", "left hand"),  # a mark between letters leaves a blank
        ("left - hand", "left hand"),
        ("red, blue", "red blue"),  # a mark beside a blank goes
        ("x/y , z/w", "x y z w"),  # each mark by itself: "/" leaves a blank though "," does not
        ("1,000", "1000"),
        ("1,000 or left-hand", "1000 or lefthand"),  # a comma between digits lets every mark vanish
        ("3.5", "3.5"),
        ("5.", "5"),  # also after a digit, since the look-behind is mistyped
        ("5.a", "5a"),
        ("U.S.A.", "usa"),
        ("." * 40, "." * 8),  # only the first 32 periods
        ("!?", ""),
    ],
)
def test_normalisation(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_score_by_number_of_agreeing_people(agreeing, score):
    answers = ["Red"] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert answer_score("red", answers) == pytest.approx(score)


def test_equal_answers_do_not_vanish_together():
    """Comparing whole records instead of positions leaves out both groups at once and gives 50 % here."""
    assert answer_score("red", ["red"] * 5 + ["blue"] * 5) == 1.0


def test_nothing_is_normalised_when_all_agree():
    assert answer_score("Yes", ["yes"] * 10) == 0
    assert answer_score(" yes\n", ["yes"] * 10) == 1
    assert answer_score("2", ["two"] * 10) == 0
    assert answer_score("Yes", ["yes"] * 9 + ["no"]) == 1
    assert answer_score("yes", ["yes"] * 5 + ["yes "] * 5) == 1  # blanks do not make them differ


def test_both_sides_are_normalised():
    assert answer_score("two", ["2"] * 4 + ["3"] * 6) == 1
    assert answer_score("2 dogs", ["The two dogs."] * 4 + ["3"] * 6) == 1


def test_five_raters_written_twice():
    """OK-VQA has each of its five answers two times: 0, 60 or 100 %."""
    assert answer_score("a", ["x", "x", "b", "b", "c", "c", "d", "d", "e", "e"]) == 0
    assert answer_score("b", ["x", "x", "b", "b", "c", "c", "d", "d", "e", "e"]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("Two.", ["2"], 1),
        ("2", ["two"], 1),
        ("3", ["two"], 0),
        ("c", ["x", "y", "c"], 1),
        ("d", ["x", "y", "c"], 0),
        ("A", ["a"], 1),
        ("", ["a"], 0),  # both normalise to nothing
    ],
)
def test_few_answers_need_one_match(prediction, answers, score):
    """Leave-one-out of fewer than four answers could never give 100 %."""
    assert answer_score(prediction, answers) == score


def test_accuracy_in_per_cent_overall_and_by_type():
    predictions = {1: "red", 2: "2", 3: "blue"}
    answers = {1: ["red"], 2: ["2", "2"] + ["3"] * 8, 3: ["green"]}
    assert vqa_accuracy(predictions, answers) == {"accuracy": pytest.approx(160 / 3)}
    found = vqa_accuracy(predictions, answers, {1: "what colour", 2: "how many", 3: "what colour"})
    assert found == {
        "accuracy": pytest.approx(160 / 3),
        "accuracy/what colour": pytest.approx(50),
        "accuracy/how many": pytest.approx(60),
    }


@pytest.mark.parametrize(
    ("predictions", "answers", "named"),
    [
        ({}, {}, "no question to score"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "1 of 2 questions were not answered, e.g. question 2"),
        ({1: "a", 5: "b"}, {1: ["a"]}, "1 answers are to no known question, e.g. question 5"),
        ({1: "a"}, {1: []}, "no true answer, e.g. question 1"),
    ],
)
def test_unmatched_questions_are_named(predictions, answers, named):
    with pytest.raises(UserError, match=named):
        vqa_accuracy(predictions, answers)


@dataclass
class Asked:
    question_id: int
    question_type: str
    answers: tuple[str, ...]


def test_majority_answer_per_type():
    train = [
        Asked(1, "how many", ("2", "2", "3")),
        Asked(2, "how many", ("3",)),
        Asked(3, "what colour", ("red", "blue")),
        Asked(4, "how many", ("3",)),
        Asked(5, "where", ()),
    ]
    assert most_common_answers(train) == {"how many": "3", "what colour": "blue"}
    asked = [Asked(10, "how many", ("1",)), Asked(11, "what colour", ("1",)), Asked(12, "why", ("1",))]
    assert majority_answers(train, asked) == {10: "3", 11: "blue", 12: "3"}
    with pytest.raises(UserError, match="no question with an answer"):
        majority_answers([], asked)
