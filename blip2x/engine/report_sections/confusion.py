"""What was answered for what: a matrix for each type of question."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from blip2x.engine.report_sections.rows import Row, group

MAX_ANSWERS = 10  # named in a matrix, the rest is "other"; more are unreadable on a phone
MIN_QUESTIONS = 20  # of a type: fewer are told better one by one
MIN_COVERED = 0.5  # share of a type's questions whose true answer is named: else the matrix would be about "other"
MAX_TYPES = 12
OTHER = "other"


@dataclass(frozen=True)
class Cell:
    """How often one answer was given where another, or the same, is true."""

    count: int
    share: float  # of the questions with this true answer
    same: bool  # both are the same answer


@dataclass(frozen=True)
class Matrix:
    """True answers by what was predicted, of one type of question."""

    title: str
    questions: int
    columns: list[str]
    rows: list[tuple[str, int, list[Cell]]]  # true answer, its questions, a cell for each column


@dataclass(frozen=True)
class Confusion:
    """The matrices of a stage, those of most questions first, and how many types have none."""

    matrices: list[Matrix]
    left_out: int


def confusion(rows: list[Row]) -> Confusion:
    """Matrices of those of a stage's questions that have a prediction and true answers; of several, the most common one.

    Answers are compared in lower case; this is stricter than the rules that score them.
    """
    asked = [row for row in rows if row.get("answers") and isinstance(row.get("prediction"), str)]
    types = group(asked, lambda row: str(row.get("question_type") or "all questions"))
    enough = {title: own for title, own in types.items() if len(own) >= MIN_QUESTIONS}
    found = [matrix for title, own in enough.items() if (matrix := _matrix(title, own)) is not None]
    found.sort(key=lambda matrix: -matrix.questions)
    return Confusion(found[:MAX_TYPES], len(types) - len(found[:MAX_TYPES]))


def _matrix(title: str, rows: list[Row]) -> Matrix | None:
    """None where none of the type's answers is common."""
    pairs = [(_true(row), _plain(row["prediction"])) for row in rows]
    common = Counter(true for true, _ in pairs).most_common(MAX_ANSWERS)
    if len(common) < 2 or sum(count for _, count in common) < MIN_COVERED * len(rows):
        return None
    named = [answer for answer, _ in common]
    if all(answer.isdecimal() for answer in named):
        named.sort(key=int)
    counts = Counter((true if true in named else None, said if said in named else None) for true, said in pairs)  # None: other
    true_answers = [*named, None] if any(true is None for true, _ in counts) else [*named]
    said_answers = [*named, None] if any(said is None for _, said in counts) else [*named]
    table = []
    for true in true_answers:
        total = sum(counts[true, said] for said in said_answers)
        cells = [Cell(n := counts[true, said], n / total, true is not None and true == said) for said in said_answers]
        table.append((_label(true), total, cells))
    return Matrix(title, len(rows), [_label(said) for said in said_answers], table)


def _true(row: Row) -> str:
    return Counter(_plain(str(answer)) for answer in row["answers"]).most_common(1)[0][0]


@lru_cache(maxsize=100_000)  # the same few answers come again and again
def _plain(answer: str) -> str:
    return " ".join(answer.lower().split())


def _label(answer: str | None) -> str:
    return OTHER if answer is None else answer or "(empty)"
