from pathlib import Path

import pytest

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.vqa import Vqa
from blip2x.errors import UserError

QUESTIONS = {
    "questions": [
        {"image_id": 42, "question": "Is it? ", "question_id": 420},
        {"image_id": 7, "question": "What now?", "question_id": 70},
    ]
}
ANSWERS = {
    "annotations": [
        {
            "question_id": 70,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": "x", "answer_id": i} for i in range(10)],
        },
        {
            "question_id": 420,
            "question_type": "is it",
            "answer_type": "yes/no",
            "answers": [{"answer": "yes"}, {"answer": "no"}],
        },
    ]
}
IMAGE = "val2014/COCO_val2014_{:012d}.jpg"


def rows(write, questions, answers=None, image=IMAGE):
    files = AnnotationFiles(questions=write("q.json", questions), answers=answers and write("a.json", answers), image=image)
    return list(Vqa(files, Path("images")).questions())


def test_questions_meet_their_answers(write):
    first, second = rows(write, QUESTIONS, ANSWERS)
    assert (first.image, first.question, first.answers) == ("val2014/COCO_val2014_000000000042.jpg", "Is it?", ("yes", "no"))
    assert (first.question_id, first.question_type, first.answer_type, first.number) == (420, "is it", "yes/no", 42)
    assert second.answers == ("x",) * 10


def test_test_questions_have_no_answers(write):
    assert [(row.answers, row.question_type) for row in rows(write, QUESTIONS)] == [((), "is"), ((), "what")]


def test_what_does_not_fit_is_named(write):
    with pytest.raises(UserError, match=r"a.json has no answers to question 420 of .*q.json"):
        rows(write, QUESTIONS, {"annotations": ANSWERS["annotations"][:1]})
    with pytest.raises(UserError, match=r"q.json gives numbers of images only; set image"):
        rows(write, QUESTIONS, image=None)
    with pytest.raises(UserError, match=r"image: '{image_id}.jpg' of the split cannot be filled in for .*questions 0"):
        rows(write, QUESTIONS, image="{image_id}.jpg")
    with pytest.raises(UserError, match=r"annotations 0: 'answers' must be a list of objects"):
        rows(write, QUESTIONS, {"annotations": [{"question_id": 1, "answers": ["yes"]}]})
    with pytest.raises(UserError, match=r"q.json must have a list at 'questions'"):
        rows(write, ANSWERS)
