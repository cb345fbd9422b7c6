from dataclasses import asdict, replace

import pytest

from blip2x.config.dataset import ImageTextPart, MixtureConfig
from blip2x.data.sources.mixture import Mixture
from blip2x.errors import UserError


@pytest.fixture
def mixture_config(custom_config):
    values = asdict(custom_config)
    first = ImageTextPart(**{key: values.pop(key) for key in ("images", "train_captions", "eval_captions", "eval_questions")})
    second = ImageTextPart(images=first.images, train_captions=first.train_captions)
    return MixtureConfig(**values | {"kind": "mixture", "name": "both", "parts": [first, second]})


def test_parts_follow_each_other_with_numbers_of_their_own(mixture_config):
    samples = Mixture(mixture_config).captions("train")
    assert len(samples) == 4 and len({sample.image_id for sample in samples}) == 4
    assert [sample.image_id for sample in samples[:2]] == [17, 4]  # the first part keeps its numbers
    assert len(Mixture(mixture_config).texts()) == 4


def test_parts_without_a_file_are_passed_over(mixture_config):
    assert len(Mixture(mixture_config).captions("eval")) == 2
    assert [q.question_id for q in Mixture(mixture_config).questions("eval")] == [7, 9]


def test_clashing_question_ids_are_numbered_anew(mixture_config):
    parts = [mixture_config.parts[0]] * 2
    questions = Mixture(replace(mixture_config, parts=parts)).questions("eval")
    assert [q.question_id for q in questions] == [0, 1, 2, 3]


def test_eval_limit_holds_for_the_whole(mixture_config):
    parts = [mixture_config.parts[0]] * 2
    assert len(Mixture(replace(mixture_config, parts=parts, eval_limit=3)).captions("eval")) == 3


def test_evaluation_does_not_need_the_training_images(mixture_config):
    parts = [mixture_config.parts[0], ImageTextPart(images="/not/fetched", train_captions="/not/fetched.json")]
    source = Mixture(replace(mixture_config, parts=parts))
    assert len(source.captions("eval")) == 2
    with pytest.raises(UserError, match="/not/fetched does not exist"):
        source.captions("train")


def test_what_is_lacking_is_named(mixture_config):
    source = Mixture(replace(mixture_config, parts=[ImageTextPart(images=mixture_config.parts[0].images)]))
    with pytest.raises(UserError, match="'both' has no captions for eval; set eval_captions"):
        source.captions("eval")
    with pytest.raises(UserError, match=r"dataset\.parts is empty"):
        Mixture(replace(mixture_config, parts=[]))
