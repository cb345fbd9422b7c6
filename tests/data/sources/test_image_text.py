from dataclasses import fields, replace

import pytest

from blip2x.config.dataset import AnnotationFiles, DatasetConfig, ImageTextConfig, ImageTextPart
from blip2x.data.sources.image_text import ImageText
from blip2x.errors import UserError


@pytest.fixture
def mixture_config(custom_config):
    custom = {field.name: getattr(custom_config, field.name) for field in fields(DatasetConfig) if field.name != "kind"}
    files = {
        "train": AnnotationFiles(captions=custom_config.train_captions),
        "test": AnnotationFiles(captions=custom_config.eval_captions, questions=custom_config.eval_questions),
    }
    first = ImageTextPart(images=custom_config.images, splits=files)
    second = replace(first, splits={"train": files["train"]})
    return ImageTextConfig(
        **custom | {"name": "both"},
        parts={"first": first, "second": second},
        train_split="train",
        val_split=None,
        eval_split="test",
        annotation_cache=custom_config.annotation_cache,
    )


def test_parts_follow_each_other_with_numbers_of_their_own(mixture_config):
    samples = ImageText(mixture_config).captions("train")
    assert len(samples) == 4 and len({sample.image_id for sample in samples}) == 4
    assert [sample.image_id for sample in samples[:2]] == [17, 4]  # the first part keeps its numbers
    assert len(ImageText(mixture_config).texts()) == 4


def test_parts_without_a_file_are_passed_over(mixture_config):
    for split in ("val", "eval"):  # without a validation split of its own
        assert len(ImageText(mixture_config).captions(split)) == 2
        assert [q.question_id for q in ImageText(mixture_config).questions(split)] == [7, 9]


def test_splits_are_chosen_by_name(mixture_config):
    chosen = ImageText(replace(mixture_config, eval_split="train"))
    assert chosen.captions("eval")[0].captions == ("A temple, with a red roof!", "a chinese temple")  # not cleaned
    with pytest.raises(UserError, match=r"dataset\.eval_split=dev: data set 'both' has the splits train, test"):
        ImageText(replace(mixture_config, eval_split="dev")).captions("eval")


def test_clashing_question_ids_are_numbered_anew(mixture_config):
    first = mixture_config.parts["first"]
    questions = ImageText(replace(mixture_config, parts={"a": first, "b": first})).questions("eval")
    assert [q.question_id for q in questions] == [0, 1, 2, 3]


def test_eval_limit_holds_for_the_whole(mixture_config):
    first = mixture_config.parts["first"]
    both = replace(mixture_config, parts={"a": first, "b": first}, eval_limit=3)
    assert len(ImageText(both).captions("eval")) == 3


def test_evaluation_does_not_need_the_training_images(mixture_config):
    absent = ImageTextPart(images="/not/fetched", splits={"train": AnnotationFiles(captions="/not/fetched.json")})
    source = ImageText(replace(mixture_config, parts={**mixture_config.parts, "second": absent}))
    assert len(source.captions("eval")) == 2
    with pytest.raises(UserError, match="/not/fetched does not exist"):
        source.captions("train")


def test_what_is_lacking_is_named(mixture_config):
    bare = ImageTextPart(images=mixture_config.parts["first"].images, splits={"test": AnnotationFiles()})
    with pytest.raises(UserError, match=r"'both' has no captions for eval; set captions of the split 'test' in dataset\.parts"):
        ImageText(replace(mixture_config, parts={"bare": bare})).captions("eval")
    with pytest.raises(UserError, match=r"dataset\.parts is empty"):
        ImageText(replace(mixture_config, parts={}))


def test_questions_with_and_without_answers_are_not_mixed(mixture_config, write):
    first = mixture_config.parts["first"]
    bare = write("bare.json", [{"image": "china.jpg", "question": "what?", "question_id": 1}])
    parts = {
        name: replace(first, splits={"train": AnnotationFiles(questions=path), "test": AnnotationFiles(questions=path)})
        for name, path in (("a", first.splits["test"].questions), ("b", bare))
    }
    for split in ("train", "eval"):
        with pytest.raises(UserError, match=f"the true answers of some parts are known for {split}, but not of all"):
            ImageText(replace(mixture_config, parts=parts)).questions(split)
