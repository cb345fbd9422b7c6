"""Matrices of answers: what counts as the true answer, what is named, and when there is none."""

from __future__ import annotations

import pytest

from blip2x.engine.report_sections.confusion import MAX_ANSWERS, MIN_QUESTIONS, OTHER, confusion


def asked(true: str | list[str], said: str | None, times: int = 1, kind: str = "colour") -> list[dict]:
    answers = [true] if isinstance(true, str) else true
    return [{"question": "?", "question_type": kind, "answers": answers, "prediction": said}] * times


def test_rows_are_true_answers_and_columns_what_was_said():
    rows = [*asked("red", "red", 15), *asked("red", "blue", 5), *asked("blue", "green", 4), *asked("blue", "blue", 6)]
    (matrix,) = confusion(rows).matrices
    assert (matrix.title, matrix.questions, matrix.columns) == ("colour", 30, ["red", "blue", OTHER])
    (red, reds, red_cells), (blue, blues, blue_cells) = matrix.rows
    assert (red, reds, blue, blues) == ("red", 20, "blue", 10)
    assert [(cell.count, cell.share, cell.same) for cell in red_cells] == [(15, 0.75, True), (5, 0.25, False), (0, 0, False)]
    assert [(cell.count, cell.share, cell.same) for cell in blue_cells] == [(0, 0, False), (6, 0.6, True), (4, 0.4, False)]


def test_the_commonest_of_several_answers_is_the_true_one_and_case_does_not_count():
    rows = [*asked(["Red", "blue", "red "], "RED", 10), *asked(["blue"], "", 10)]
    (matrix,) = confusion(rows).matrices
    assert matrix.columns == ["red", "blue", OTHER] and matrix.rows[0][2][0].count == 10 and matrix.rows[1][2][2].count == 10


def test_numbers_come_in_order_and_rare_answers_are_other():
    rows = [row for n in range(MAX_ANSWERS + 3) for row in asked(str(n), str(n), 20 - n)]
    (matrix,) = confusion(rows).matrices
    assert matrix.columns == [*map(str, range(MAX_ANSWERS)), OTHER]
    other, questions, cells = matrix.rows[-1]
    assert (other, questions) == (OTHER, 10 + 9 + 8)
    assert cells[-1].count == questions and not cells[-1].same  # three answers, of which any may have been said for any


@pytest.mark.parametrize(
    "rows",
    [
        [*asked("red", "red", MIN_QUESTIONS - 2), *asked("blue", "red")],  # too few
        asked("red", "red", 40),  # one answer
        [row for n in range(60) for row in asked(f"thing {n}", "red")],  # none is common
    ],
)
def test_a_type_without_enough_has_no_matrix_and_is_counted(rows):
    enough = [*asked("yes", "no", 10, "is it"), *asked("no", "no", 10, "is it")]
    found = confusion([*rows, *enough])
    assert [matrix.title for matrix in found.matrices] == ["is it"] and found.left_out == 1


def test_types_with_most_questions_come_first_and_those_without_a_type_are_one():
    rows = [*asked("a", "b", 15, "few"), *asked("b", "b", 15, "few"), *asked("a", "b", 20, None), *asked("b", "b", 20, None)]
    assert [matrix.title for matrix in confusion(rows).matrices] == ["all questions", "few"]


def test_questions_without_truth_or_prediction_have_none():
    assert confusion([*asked([], "red", 30), *asked("red", None, 30), {"question": "?"}]).matrices == []
