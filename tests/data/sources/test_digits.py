from dataclasses import replace

import numpy as np
import pytest

from blip2x.data.sources.digits import Digits
from blip2x.errors import UserError


@pytest.fixture
def digits(digits_config):
    return Digits(digits_config)


def sources(scenes):
    return {p.source for scene in scenes for p in scene.digits}


def combinations(scenes):
    return frozenset().union(*(scene.combinations for scene in scenes))


def test_images_and_combinations_are_held_out(digits):
    assert not sources(digits.train_scenes) & sources(digits.eval_scenes)
    assert len(digits.held_out) == 6
    assert not combinations(digits.train_scenes) & digits.held_out
    assert len(combinations(digits.train_scenes)) == 54  # all others occur
    groups = {True: "held_out", False: "seen"}
    for sample, scene in zip(digits.captions("eval"), digits.eval_scenes, strict=True):
        assert sample.group == groups[bool(scene.combinations & digits.held_out)]
    assert [sample.group for sample in digits.captions("eval")].count("held_out") == 20
    assert {sample.group for sample in digits.captions("train")} == {"seen"}


def test_texts_never_name_a_held_out_combination(digits):
    texts = "\n".join(digits.texts())
    assert len(digits.texts()) == 300 and "question: " in texts
    for digit, colour in digits.held_out:
        assert f"{colour} {digit}" not in texts and f"{digit} in {colour}" not in texts
        assert f"which digit is {colour} ? short answer: {digit}" not in texts
        assert f"what colour is the {digit} ? short answer: {colour}" not in texts


def test_the_same_seed_gives_the_same_data_and_another_does_not(digits, digits_config):
    again, other = Digits(digits_config), Digits(replace(digits_config, seed=1))
    assert again.texts() == digits.texts() and other.texts() != digits.texts()
    assert other.held_out != digits.held_out
    for split in ("train", "eval"):
        assert [s.captions for s in again.captions(split)] == [s.captions for s in digits.captions(split)]
        assert [s.question for s in again.questions(split)] == [s.question for s in digits.questions(split)]
    first, second = (d.captions("eval")[0].image.open() for d in (digits, again))
    assert np.array_equal(np.asarray(first), np.asarray(second))


def test_a_validation_sees_the_evaluations_pictures_and_texts(digits):
    """Otherwise the figures of a validation would not be those of the evaluation."""
    for first, second in (
        (digits.captions("val"), digits.captions("eval")),
        (digits.questions("val"), digits.questions("eval")),
    ):
        assert [(sample.image_id, sample.truth) for sample in first] == [(sample.image_id, sample.truth) for sample in second]


def test_easier_training_scenes_leave_the_held_out_alone(digits, digits_config):
    easy = Digits(replace(digits_config, max_digits=1, train_scenes=50))
    assert easy.held_out == digits.held_out and easy.eval_sources == digits.eval_sources
    assert {len(scene.digits) for scene in easy.train_scenes} == {1}


def test_evaluation_scenes_differ_in_what_they_show(digits):
    shown = [scene.combinations for scene in digits.eval_scenes]
    assert len(set(shown)) == len(shown)


def test_ids_are_unique_and_questions_belong_to_images(digits):
    captions = digits.captions("train") + digits.captions("eval")
    assert len({s.image_id for s in captions}) == 380
    questions = digits.questions("eval")
    assert len({q.question_id for q in questions}) == len(questions)
    by_id = {s.image_id: s for s in digits.captions("eval")}
    assert all(q.image.scene == by_id[q.image_id].image.scene and q.group == by_id[q.image_id].group for q in questions)
    assert all(len(q.answers) == 1 for q in questions)


@pytest.mark.parametrize("side", [3, 6])
def test_labels_say_what_each_patch_shows(digits, digits_config, side):
    for sample, scene in zip(digits.labels("train", patches_per_side=side), digits.train_scenes, strict=True):
        digit, colour = (sample.labels[name].reshape(side, side) for name in ("digit", "colour"))
        assert (np.count_nonzero(digit), np.count_nonzero(colour)) == (len(scene.digits) * (side // 3) ** 2,) * 2
        for p in scene.digits:
            row, column = p.row * side // 3 + side // 3 - 1, p.column * side // 3
            assert digit[row, column] == p.digit + 1
            assert digits_config.colours[colour[row, column] - 1] == p.colour
    assert digits.label_classes == {"digit": 11, "colour": 7}


def test_labels_need_patches_aligned_with_cells(digits):
    with pytest.raises(UserError, match=r"4 x 4 patches do not align with dataset.grid=3"):
        digits.labels("train", patches_per_side=4)


def test_eval_limit_keeps_the_first_scenes_of_both_groups(digits, digits_config):
    few = Digits(replace(digits_config, eval_limit=8))
    assert few.eval_scenes == digits.eval_scenes[:8]
    assert len({q.image_id for q in few.questions("eval")}) == 8
    assert [s.group for s in few.captions("eval")].count("held_out") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colours": ["red", "mauve", "blue"]}, "got red, mauve, blue"),
        ({"colours": ["red", "red", "blue"]}, "different ones of"),
        ({"max_digits": 4}, "max_digits must be 1 to 3 .* got 4"),
        ({"grid": 1}, "max_digits must be 1 to 1"),
        ({"held_out_combinations": 51}, "must be 0 to 50, .* got 51"),
        ({"held_out_digits": 1.0}, "between 0 and 1, got 1.0"),
        ({"cell": 4}, "at least 8 pixels, .* got 4"),
        ({"train_scenes": 0}, "dataset.train_scenes must be at least 1, got 0"),
        ({"eval_limit": 0}, "dataset.eval_limit must be at least 1 or null, got 0"),
    ],
)
def test_impossible_settings_are_refused(digits_config, change, message):
    with pytest.raises(UserError, match=message):
        Digits(replace(digits_config, **change))
