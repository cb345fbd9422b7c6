"""The official VQA rules by hand-worked cases, each with the quirk that it holds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from blip2x.config.task import AnswerRules
from blip2x.errors import UserError
from blip2x.metrics.vqa import RULES, answer_score, answer_scores, majority_answers, normalise_answer


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


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "lavis"),
    [
        ("Yes", ["yes"] * 10, 0, 1),  # LAVIS normalises the prediction though all agree
        ("yes", ["Yes"] * 10, 0, 0),  # and never the annotators' letters
        ("2", ["two"] * 10, 0, 0),
        ("two", ["two"] * 10, 1, 0),  # nor their numbers
        ("2", ["two"] * 5 + ["3"] * 5, 1, 0),
        ("cat", ["a cat"] * 5 + ["dog"] * 5, 1, 0),  # nor their articles
        ("left-hand", ["left-hand"] * 5 + ["right"] * 5, 1, 1),  # but their punctuation, where they differ
        ("left-hand", ["left-hand"] * 10, 1, 0),
        ("a cat.", ["cat"] * 2 + ["dog"] * 8, 0.6, 0.6),
        ("red", ["red", " red"] * 5, 1, 1),
        ("Two.", ["2"], 1, 1),  # both know no rule for so few
    ],
)
def test_lavis_differs_from_the_official_rules(prediction, answers, official, lavis):
    assert answer_score(prediction, answers) == pytest.approx(official)
    assert RULES["vqa_lavis"](prediction, answers) == pytest.approx(lavis)


@pytest.mark.parametrize(
    ("prediction", "answer", "plain", "lavis"),
    [
        ("left", "left", 1, 1),
        ("Left", "left", 0, 1),
        ("the left", "left", 0, 1),
        ("2", "two", 0, 1),
        ("right", "left", 0, 0),
    ],
)
def test_gqa_has_one_answer(prediction, answer, plain, lavis):
    assert (RULES["gqa"](prediction, [answer]), RULES["gqa_lavis"](prediction, [answer])) == (plain, lavis)
    for rules in ("gqa", "gqa_lavis"):
        with pytest.raises(UserError, match="one answer per question, but one here has 2"):
            RULES[rules](prediction, [answer, answer])


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (10, 1)])
def test_aokvqa_leaves_no_answer_out(matches, score):
    answers = ["boat"] * matches + ["Boat"] * (10 - matches)
    assert RULES["aokvqa"]("boat", answers) == pytest.approx(score)


def test_every_rule_can_be_chosen_and_no_other():
    assert {rules.value for rules in AnswerRules} == set(RULES)


def test_scores_of_all_questions_in_their_order():
    predictions = {3: "blue", 1: "red", 2: "2"}
    answers = {1: ["red"], 2: ["2", "2"] + ["3"] * 8, 3: ["green"]}
    assert list(answer_scores(predictions, answers).items()) == [(1, 1), (2, pytest.approx(0.6)), (3, 0)]
    assert answer_scores(predictions, answers, "aokvqa") == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: 0}


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
        answer_scores(predictions, answers)


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
    asked = [Asked(10, "how many", ("1",)), Asked(11, "what colour", ("1",)), Asked(12, "why", ("1",))]
    assert majority_answers(train, asked) == {10: "3", 11: "blue", 12: "3"}
    with pytest.raises(UserError, match="no question with an answer"):
        majority_answers([], asked)
