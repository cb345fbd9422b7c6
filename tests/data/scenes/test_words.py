import random
import re

import pytest

from blip2x.data.scenes import words
from blip2x.data.scenes.scene import PlacedDigit, Scene, SceneLottery

RED_3 = PlacedDigit(3, "red", row=0, column=0, source=0)
BLUE_7 = PlacedDigit(7, "blue", row=0, column=2, source=0)
ORANGE_1 = PlacedDigit(1, "orange", row=2, column=0, source=0)


@pytest.fixture
def scenes():
    colours = ["red", "green", "blue", "orange"]
    lottery = SceneLottery(sources={d: [0] for d in range(10)}, colours=colours, grid=3, max_digits=3, seed="words")
    return [lottery.draw() for _ in range(200)]


def test_captions_of_one_digit():
    found = set(words.captions(Scene((RED_3,)), 10, random.Random(0)))
    assert found == {"a red 3", "one digit : a red 3", "a single red 3", "a 3 in red"}


def test_captions_of_two_digits():
    found = set(words.captions(Scene((RED_3, BLUE_7)), 20, random.Random(0)))
    assert found == {
        "a red 3 and a blue 7", "a blue 7 and a red 3", "two digits : a red 3 and a blue 7",
        "two digits : a blue 7 and a red 3", "a red 3 left of a blue 7", "a blue 7 right of a red 3",
    }  # fmt: skip


def test_captions_of_three_digits():
    found = words.captions(Scene((RED_3, BLUE_7, ORANGE_1)), 50, random.Random(0))
    assert "a red 3 left of a blue 7 and above an orange 1" in found
    assert "three digits : an orange 1 , a red 3 and a blue 7" in found
    assert not any("a orange" in caption or "an red" in caption for caption in found)


def test_every_caption_names_every_digit(scenes):
    for scene in scenes:
        captions = words.captions(scene, 4, random.Random(0))
        assert len(captions) == len(set(captions)) == 4
        for caption in captions:
            assert set(re.findall(r"\d", caption)) == {str(p.digit) for p in scene.digits}
            assert all(p.colour in caption for p in scene.digits)


def answers(scene, question):
    """All right answers, found from the words of the question alone."""
    cells = {(p.row, p.column): p for p in scene.digits}
    if question == "how many digits are there ?":
        return [["zero", "one", "two", "three"][len(cells)]]
    colour_of = re.fullmatch(r"what colour is the (\d) \?", question)
    if colour_of:
        return [p.colour for p in cells.values() if p.digit == int(colour_of[1])]
    digit_of = re.fullmatch(r"which digit is (\w+) \?", question)
    if digit_of:
        return [str(p.digit) for p in cells.values() if p.colour == digit_of[1]]
    asked = re.fullmatch(
        r"(which digit is|what colour is the digit) (left of|right of|above|below) the (\w+ )?(\d) \?", question
    )
    what, relation, colour, digit = asked.groups()
    anchor = next(p for p in cells.values() if p.digit == int(digit))
    assert colour is None or colour.strip() == anchor.colour
    there = {
        "left of": [p for p in cells.values() if p.column < anchor.column],
        "right of": [p for p in cells.values() if p.column > anchor.column],
        "above": [p for p in cells.values() if p.row < anchor.row],
        "below": [p for p in cells.values() if p.row > anchor.row],
    }[relation]
    return [str(p.digit) if what.startswith("which") else p.colour for p in there]


def test_every_question_has_one_answer_and_it_is_the_given_one(scenes):
    types = set()
    for scene in scenes:
        for asked in words.questions(scene, 100, random.Random(1)):
            assert answers(scene, asked.question) == [asked.answer]
            assert asked.answer_type == ("other" if asked.answer.isalpha() and asked.question_type != "count" else "number")
            types.add(asked.question_type)
    assert types == {"digit", "colour", "count", "spatial digit", "spatial colour"}


def test_few_questions_are_of_many_types():
    asked = words.questions(Scene((RED_3, BLUE_7, ORANGE_1)), 5, random.Random(0))
    assert len({question.question_type for question in asked}) == 5


def test_documents_ask_only_what_their_captions_answer():
    scene = Scene((RED_3, BLUE_7, ORANGE_1))
    spatial = 0
    for seed in range(200):
        lines = words.document(scene, max_captions=2, max_questions=20, rng=random.Random(seed)).split("\n")
        captions = [line for line in lines if not line.startswith("question: ")]
        for line in lines[len(captions) :]:
            asked = re.fullmatch(r"question: (.* \?) short answer: (\w+)", line)
            assert answers(scene, asked[1]) == [asked[2]]
            relation = re.search(r"(left of|right of|above|below) the (?:\w+ )?(\d)", asked[1])
            if relation:
                spatial += 1
                inverse = words.INVERSE[relation[1]]
                stated = any(re.search(rf"{relation[1]} \w+ \w+ {relation[2]}", caption) for caption in captions)
                turned = any(re.match(rf"\w+ \w+ {relation[2]} .*{inverse}", caption) for caption in captions)
                assert stated or turned
    assert spatial > 100
