import json
from dataclasses import replace

import pytest

from blip2x.config.dataset import OnBadImage
from blip2x.data.sources.custom import Custom
from blip2x.errors import UserError


def test_captions_are_gathered_by_image(custom_config, photos):
    china, flower = Custom(custom_config).captions("train")
    assert china.captions == ("a temple, with a red roof", "a chinese temple")
    assert flower.captions == ("a purple flower", "one flower")
    assert (china.image_id, flower.image_id) == (17, 4)
    assert flower.image.name == str(photos / "flowers" / "flower.jpg")
    assert flower.image.open().size == (640, 427)


def test_evaluation_captions_stay_as_they_are(custom_config):
    assert Custom(custom_config).captions("eval")[0].captions == ("A temple, with a red roof!", "a chinese temple")


def test_questions_come_with_all_answers(custom_config):
    temple, colour = Custom(custom_config).questions("eval")
    assert (temple.question_id, temple.answers, temple.image_id) == (7, ("temple",) * 10, 0)
    assert (colour.question_id, colour.answers, colour.question_type) == (9, ("purple",), "which")


def test_texts_are_the_training_captions(custom_config):
    assert Custom(custom_config).texts()[0] == "a temple, with a red roof\na chinese temple"


def test_eval_limit_counts_images(custom_config, write):
    questions = [{"image": i, "question": "what?", "answer": "x"} for i in ("china.jpg", "flowers/flower.jpg", "china.jpg")]
    source = Custom(replace(custom_config, eval_limit=1, eval_questions=write("q.json", questions)))
    assert len(source.captions("eval")) == 1 and len(source.captions("train")) == 2
    assert [q.question_id for q in source.questions("eval")] == [0, 2]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.captions("train"), "'custom' has no captions for train; set dataset.train_captions"),
        (lambda s: s.texts(), "'custom' has no captions for train; set dataset.train_captions"),
        (lambda s: s.questions("eval"), "'custom' has no questions for eval; set dataset.eval_questions"),
        (lambda s: s.questions("train"), "'custom' has no questions for train; set dataset.train_questions"),
        (lambda s: s.labels("train", patches_per_side=3), "'custom' has no patch labels"),
        (lambda s: s.label_classes, "'custom' has no patch labels"),
    ],
)
def test_what_is_lacking_is_named(custom_config, ask, message):
    source = Custom(replace(custom_config, train_captions=None, eval_questions=None))
    with pytest.raises(UserError, match=message):
        ask(source)


def test_a_missing_image_folder_is_named(custom_config):
    with pytest.raises(UserError, match="image folder /no/such does not exist"):
        Custom(replace(custom_config, images="/no/such")).captions("train")


def rows(count):
    return [{"image": "china.jpg", "caption": "a temple"}, *({"image": f"no{i}.jpg", "caption": "gone"} for i in range(count))]


def test_missing_images_stop_before_any_work(custom_config, write):
    source = Custom(replace(custom_config, train_captions=write("gaps.json", rows(5))))
    with pytest.raises(UserError, match=r"5 of 6 images of .*gaps.json are missing in .*: no0.jpg, no1.jpg, no2.jpg, \.\.\."):
        source.captions("train")


def test_missing_images_are_skipped_counted_and_named_on_request(custom_config, photos, write):
    path = write("gaps.json", rows(2))
    source = Custom(replace(custom_config, train_captions=path, on_bad_image=OnBadImage.skip))
    assert [sample.captions for sample in source.captions("train")] == [("a temple",)]
    assert source.captions("train").left_out == 2 and source.captions("eval").left_out == 0
    source.captions("train")  # read again, named once
    assert source.skipped == [f"image {photos}/no{i}.jpg does not exist" for i in range(2)]


def test_all_images_missing_stops_even_where_skipping_is_allowed(custom_config, write):
    path = write("gaps.json", [{"image": "no.jpg", "caption": "gone"}])
    with pytest.raises(UserError, match="1 of 1 images"):
        Custom(replace(custom_config, train_captions=path, on_bad_image=OnBadImage.skip)).captions("train")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"image": "china.jpg", "caption": "ok"}, {"image": "china.jpg"}], r"entry 1 has no 'caption'; its keys: 'image'"),
        ([{"caption": "ok"}], r"entry 0 has no 'image'"),
        ([{"image": "china.jpg", "caption": "  "}], r"entry 0: 'caption' is empty"),
        ([{"image": "china.jpg", "caption": ["ok", ""]}], r"entry 0: 'caption' is empty"),
        ([{"image": "china.jpg", "caption": "..."}], r"entry 0: 'caption' is empty but for punctuation"),
        ([{"image": "../secret.jpg", "caption": "ok"}], r"entry 0: image '../secret.jpg' lies outside the image folder"),
        ([{"image": "a/../../s.jpg", "caption": "ok"}], r"entry 0: image .* lies outside the image folder"),
        ([{"image": "/etc/passwd", "caption": "ok"}], r"entry 0: image '/etc/passwd' lies outside the image folder"),
    ],
)
def test_bad_entries_are_named(custom_config, write, entries, message):
    source = Custom(replace(custom_config, train_captions=write("bad.json", entries)))
    with pytest.raises(UserError, match=message):
        source.captions("train")


def test_numbers_are_counted_where_the_files_do_not_fit(custom_config, write):
    entries = [{"image": i, "caption": "x", "image_id": "same_1"} for i in ("flowers/flower.jpg", "china.jpg")]
    source = Custom(replace(custom_config, train_captions=write("same.json", entries)))
    assert [sample.image_id for sample in source.captions("train")] == [0, 1]


def test_repeated_question_ids_are_refused(custom_config, write):
    questions = [{"image": "china.jpg", "question": "what?", "answer": "x", "question_id": 3}] * 2
    with pytest.raises(UserError, match="question_id 3 is given more than once"):
        Custom(replace(custom_config, eval_questions=write("twice.json", json.dumps(questions)))).questions("eval")
