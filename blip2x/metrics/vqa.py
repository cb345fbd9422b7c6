"""Scores of answers, each by the rules of a published evaluation with its quirks, for they change published numbers.

``vqa``: the official program of VQAv2 (visualqa.org), also used for OK-VQA. Answers are left as they are when all annotators
agree, only the first 32 periods of an answer are removed, and a comma between digits makes every punctuation mark vanish
instead of leaving a blank. Unlike the official program, leave-one-out goes by position, which needs no ``answer_id``.
``vqa_lavis``: what BLIP-2's published figures were computed by. The prediction is always normalised, even when all annotators
agree; of the annotators' answers only the punctuation is. So "two", "a cat" or "Yes" from an annotator are never met.
``gqa``: equal to the only answer, letter by letter. ``gqa_lavis``: equal after both were normalised by the VQA rules.
``aokvqa``: A-OKVQA's direct answers, min(1, matches / 3) among all ten, letter by letter and without leaving one out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Protocol

from blip2x.errors import UserError

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # also after a digit: the official look-behind is mistyped and excludes nothing
_MAX_PERIODS = 32  # the official program passes re.UNICODE, which is 32, where `count` goes
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_CONTRACTED = """
    'twas ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
    it'd it'll let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't she's should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've 'ow's'at couldn't've
    hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've there'd've
    they'd've we'd've who'd've wouldn't've y'all'd've y'all'll you'd've
"""
# Each spelling that lacks one apostrophe, except those that are words; the last is a slip of the official table.
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i in range(len(word)) if word[i] == "'"}
_CONTRACTIONS = {k: v for k, v in _CONTRACTIONS.items() if k not in ("lets", "shes")} | {"somebody'd": "somebodyd"}

_FEW = 4  # fewer answers than this cannot give 100 % when one is left out and three have to match


class Question(Protocol):
    """What the baselines read of a question."""

    question_id: int
    question_type: str
    answers: Sequence[str]


@lru_cache(maxsize=200_000)  # the few thousand answers that are usual make up nearly all of a data set's
def normalise_answer(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes in contractions, no punctuation."""
    return _normalise_words(_strip_marks(_one_line(text)))


def answer_score(prediction: str, answers: Sequence[str]) -> float:
    """How right one answer is by VQAv2's rules, 0 to 1.

    Of four answers and more: min(1, matches / 3), averaged over leaving out each annotator. Of one to three, which the
    official rules do not know: 1 if any of them is met after normalisation.
    """
    if len(answers) < _FEW:
        return float(_compared(prediction) in map(_compared, answers))
    prediction, given = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(given)) > 1:
        prediction, given = normalise_answer(prediction), [normalise_answer(answer) for answer in given]
    return _leave_one_out(given.count(prediction), len(given))


def _lavis_score(prediction: str, answers: Sequence[str]) -> float:
    if len(answers) < _FEW:
        return answer_score(prediction, answers)
    given = answers if len(set(answers)) == 1 else [_strip_marks(answer) for answer in answers]
    return _leave_one_out(given.count(normalise_answer(prediction)), len(given))


def _gqa_score(prediction: str, answers: Sequence[str]) -> float:
    return float(prediction == _only(answers))


def _gqa_lavis_score(prediction: str, answers: Sequence[str]) -> float:
    # no newline is made a blank and nothing is stripped here, but words are split at both
    return float(_normalise_words(_strip_marks(prediction)) == _normalise_words(_strip_marks(_only(answers))))


def _aokvqa_score(prediction: str, answers: Sequence[str]) -> float:
    return min(1.0, sum(answer == prediction for answer in answers) / 3)


RULES: Mapping[str, Callable[[str, Sequence[str]], float]] = MappingProxyType(
    {
        "vqa": answer_score,
        "vqa_lavis": _lavis_score,
        "gqa": _gqa_score,
        "gqa_lavis": _gqa_lavis_score,
        "aokvqa": _aokvqa_score,
    }
)


def answer_scores(predictions: Mapping[int, str], answers: Mapping[int, Sequence[str]], rules: str = "vqa") -> dict[int, float]:
    """How right each answer is, 0 to 1, by question id in the order of `answers`.

    Args:
        predictions: question id -> answer.
        answers: question id -> the annotators' answers, the same ids.
        rules: a key of `RULES`.

    Raises:
        UserError: there is no question, a question has no answers or no prediction, a prediction no question, or a question
            has several answers where the rules know one only.
    """
    _check(predictions, answers)
    score = RULES[rules]
    return {question_id: score(predictions[question_id], given) for question_id, given in answers.items()}


def majority_answers(train: Iterable[Question], questions: Iterable[Question]) -> dict[int, str]:
    """Question id -> the commonest training answer of its type, or of all questions where the type is new.

    Of equally frequent ones it is the first in the alphabet.

    Raises:
        UserError: there is no training answer at all.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in train:
        counts[question.question_type].update(question.answers)
    overall: Counter[str] = Counter()
    for counter in counts.values():  # their sum() would copy what is there for each type
        overall.update(counter)
    if not overall:
        raise UserError("the commonest answer is unknown: the training split has no question with an answer")
    by_type, usual = {kind: _commonest(counter) for kind, counter in counts.items() if counter}, _commonest(overall)
    return {question.question_id: by_type.get(question.question_type, usual) for question in questions}


def _commonest(counter: Counter[str]) -> str:
    return min(counter, key=lambda answer: (-counter[answer], answer))


def _compared(text: str) -> str:
    return normalise_answer(text) or _one_line(text).lower()  # "a" is an article, yet no answer is not the answer "a"


@cache
def _leave_one_out(matches: int, count: int) -> float:
    """The mean of min(1, matches / 3) over leaving out each of `count` answers, of which `matches` are met."""
    return (matches * min(1.0, (matches - 1) / 3) + (count - matches) * min(1.0, matches / 3)) / count


def _only(answers: Sequence[str]) -> str:
    if len(answers) != 1:
        raise UserError(
            f"GQA's rules know one answer per question, but one here has {len(answers)}, e.g. {answers[0]!r}; "
            "choose other rules by task.answer_rules"
        )
    return answers[0]


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=200_000)
def _strip_marks(text: str) -> str:
    always = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for mark in _MARKS:
        if mark in text:
            beside_blank = f"{mark} " in text or f" {mark}" in text
            stripped = stripped.replace(mark, "" if always or beside_blank else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)


def _normalise_words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _check(predictions: Mapping[int, str], answers: Mapping[int, Sequence[str]]) -> None:
    if not answers:
        raise UserError("there is no question to score")
    without = [question_id for question_id, given in answers.items() if not given]
    if without:
        raise UserError(f"{len(without)} of {len(answers)} questions have no true answer, e.g. question {without[0]}")
    unanswered = [question_id for question_id in answers if question_id not in predictions]
    if unanswered:
        raise UserError(f"{len(unanswered)} of {len(answers)} questions were not answered, e.g. question {unanswered[0]}")
    unasked = [question_id for question_id in predictions if question_id not in answers]
    if unasked:
        raise UserError(f"{len(unasked)} answers are to no known question, e.g. question {unasked[0]}")
