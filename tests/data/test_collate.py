import random
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from blip2x.data.collate import (
    ImageCollate,
    LanguageCollate,
    LanguageEncoderDecoderCollate,
    QuestionCollate,
    QuestionTexts,
    Stage1Collate,
    Stage2Collate,
    Stage2EncoderDecoderCollate,
    VisionCollate,
)
from blip2x.data.samples import CaptionSample, LabelledImage, QuestionSample
from blip2x.data.tokenize import train_tokenizer
from blip2x.errors import UserError

CAPTIONS = ("a red 3 and a blue 7", "a red 3 left of a blue 7")
DOCUMENT = "a red 3 and a blue 7\nquestion: which digit is red ? short answer: 3"
PICTURE = SimpleNamespace(name="p", open=lambda: "picture")


class FakeTransform:
    def __call__(self, image, rng):
        assert image == "picture"
        return np.full((3, 4, 4), rng.random(), dtype=np.float32)

    def load(self, picture, rng):
        return self(picture.open(), rng)


transform = FakeTransform()


def tokenizer(family):
    return train_tokenizer([DOCUMENT, *CAPTIONS, "a photo of"], family)


def batch(collate, samples):
    return collate([collate.load(sample, random.Random(index)) for index, sample in enumerate(samples)])


@pytest.fixture
def samples():
    return [CaptionSample(PICTURE, CAPTIONS, image_id=10 + index) for index in range(12)]


def texts(collate, ids_BL):
    return [collate.tokenizer.decode(row) for row in ids_BL]


IN_AND_OUT = {"input_ids_BL", "input_mask_BL", "output_ids_BT", "output_mask_BT", "target_place_N"}


def test_stage1_has_one_of_the_captions_and_the_places_to_predict(samples):
    collate = Stage1Collate(transform, tokenizer("bert"), max_txt_len=16)
    made = batch(collate, samples)
    assert set(made) == {"image_BCHW", "image_id_B", "text_ids_BL", "text_mask_BL", "target_place_N"}
    ids, mask = made["text_ids_BL"], made["text_mask_BL"]
    assert made["image_BCHW"].shape == (12, 3, 4, 4) and ids.shape == mask.shape == (12, mask.sum(axis=1).max())
    assert made["image_id_B"].tolist() == list(range(10, 22)) and made["image_id_B"].dtype == np.int64
    assert set(texts(collate, ids)) == set(CAPTIONS)
    targets = [token for row, count in zip(ids, mask.sum(axis=1), strict=True) for token in row[1:count]]
    assert ids[:, 1:].reshape(-1)[made["target_place_N"]].tolist() == targets and 24 < len(targets) < ids[:, 1:].size


@pytest.mark.parametrize(("prompt", "given"), [("", 1), ("a photo of", 4), ("a photo of ", 4)])
def test_stage2_learns_caption_and_end_only(samples, prompt, given):
    collate = Stage2Collate(transform, tokenizer("opt"), max_txt_len=16, prompt=prompt)
    made = batch(collate, samples)
    assert set(made) == {"image_BCHW", "text_ids_BL", "text_mask_BL", "label_mask_BL", "target_place_N"}
    assert made["target_place_N"].tolist() == made["label_mask_BL"].flatten().nonzero()[0].tolist()
    for ids, mask, label in zip(made["text_ids_BL"], made["text_mask_BL"], made["label_mask_BL"], strict=True):
        assert label[:given].sum() == 0 and np.array_equal(label[given:], mask[given:])
        assert collate.tokenizer.decode(ids[:given]) == prompt.strip()
        assert collate.tokenizer.decode(ids[label == 1]) in CAPTIONS
        assert ids[label == 1][-1] == collate.tokenizer.end_id


def test_stage2_keeps_the_end_of_long_captions(samples):
    made = batch(Stage2Collate(transform, tokenizer("opt"), max_txt_len=5, prompt=""), samples)
    assert (made["text_ids_BL"][:, -1] == tokenizer("opt").end_id).all() and made["label_mask_BL"][:, -1].all()


def test_a_prompt_without_room_for_a_caption_is_refused():
    with pytest.raises(UserError, match=r"task\.max_txt_len=5 leaves no room for a caption after the prompt 'a photo of'"):
        Stage2Collate(transform, tokenizer("opt"), max_txt_len=5, prompt="a photo of")


def test_encoder_decoder_splits_at_random_words(samples):
    collate = Stage2EncoderDecoderCollate(transform, tokenizer("t5"), max_txt_len=16, prompt="a photo of", prefix_split=True)
    made = batch(collate, samples)
    assert set(made) == {"image_BCHW", *IN_AND_OUT}
    assert made["target_place_N"].tolist() == made["output_mask_BT"].flatten().nonzero()[0].tolist()
    inputs, outputs = texts(collate, made["input_ids_BL"]), texts(collate, made["output_ids_BT"])
    assert all(f"{given} {asked}".removeprefix("a photo of ") in CAPTIONS for given, asked in zip(inputs, outputs, strict=True))
    assert all(outputs) and len(set(inputs)) > 3


def test_encoder_decoder_without_split_reads_the_prompt_alone(samples):
    collate = Stage2EncoderDecoderCollate(transform, tokenizer("t5"), max_txt_len=16, prompt="", prefix_split=False)
    made = batch(collate, samples)
    assert made["input_ids_BL"].tolist() == [[collate.tokenizer.end_id]] * 12  # an empty prompt is </s>, as in generation
    assert set(texts(collate, made["output_ids_BT"])) == set(CAPTIONS)


def test_language_documents_keep_their_lines():
    collate = LanguageCollate(tokenizer("opt"), max_txt_len=40)
    made = batch(collate, [DOCUMENT, CAPTIONS[0]])
    assert set(made) == {"text_ids_BL", "text_mask_BL", "target_place_N"}
    rows, columns = np.divmod(made["target_place_N"], made["text_ids_BL"].shape[1])
    assert columns.min() == 1 and np.bincount(rows).tolist() == (made["text_mask_BL"].sum(axis=1) - 1).tolist()
    assert (made["text_ids_BL"] == collate.tokenizer.end_id).sum(axis=1).tolist() == [2, 1]
    assert made["text_mask_BL"].sum(axis=1).tolist() == [(made["text_ids_BL"][b] != 1).sum() for b in (0, 1)]


def test_language_encoder_decoder_completes_lines():
    collate = LanguageEncoderDecoderCollate(tokenizer("t5"), max_txt_len=40)
    loaded = [collate.load(DOCUMENT, random.Random(seed)) for seed in range(200)]
    for before, after in loaded:
        assert after and "\n" not in after
        assert (before + " " + after).replace("\n ", "\n").strip() in (DOCUMENT, DOCUMENT.split("\n")[0])
    answered = [after for before, after in loaded if before.endswith("short answer:")]
    assert len(answered) > 30 and set(answered) == {"3"}
    assert not any("question" in after for _, after in loaded)  # it answers, it never asks
    made = collate(loaded[:4])
    assert set(made) == IN_AND_OUT
    assert re.sub(r"\W", "", collate.tokenizer.decode(made["output_ids_BT"][0])) == re.sub(r"\W", "", loaded[0][1])


def test_vision_stacks_every_label():
    labels = [{"digit": np.array([0, index]), "colour": np.array([index, 0])} for index in range(3)]
    made = batch(VisionCollate(transform), [LabelledImage(PICTURE, one) for one in labels])
    assert set(made) == {"image_BCHW", "label_digit_BP", "label_colour_BP"}
    assert made["label_digit_BP"].tolist() == [[0, 0], [0, 1], [0, 2]]


def test_images_alone(samples):
    made = batch(ImageCollate(transform), samples[:2])
    assert set(made) == {"image_BCHW", "image_id_B"} and made["image_id_B"].tolist() == [10, 11]


ASKED = "question: {} short answer:"


def question(words="which digit is red ?", answers=("3",)):
    return QuestionSample(7, PICTURE, words, answers, "", "", image_id=1)


def question_texts(family, max_txt_len=24, prompt=ASKED):
    return QuestionTexts(tokenizer("bert"), tokenizer(family), prompt, max_txt_len, clean=False)


def test_a_questions_answer_and_end_are_learned_each_behind_its_own_prompt():
    collate = QuestionCollate(transform, question_texts("opt"))
    made = batch(collate, [question(), question("which digit is left of a blue digit ?", ("a red 7",))])
    names = {"question_ids_BK", "question_mask_BK", "text_ids_BL", "text_mask_BL", "label_mask_BL", "target_place_N"}
    assert set(made) == {"image_BCHW", *names} and made["image_BCHW"].shape == (2, 3, 4, 4)
    words, reader = collate.texts.language, collate.texts.qformer
    expected = [("which digit is red ?", "3"), ("which digit is left of a blue digit ?", "a red 7")]
    for row, (asked, answer) in enumerate(expected):
        ids, label = made["text_ids_BL"][row], made["label_mask_BL"][row]
        assert words.decode(ids[label == 1]) == answer and ids[label == 1][-1] == words.end_id
        given = ids[(made["text_mask_BL"][row] == 1) & (label == 0)]
        assert given[0] == words.bos_id and words.decode(given) == ASKED.replace("{}", asked).replace(":", " :")
        read = made["question_ids_BK"][row][made["question_mask_BK"][row] == 1]
        assert reader.decode(read) == asked and (read[0], read[-1]) == (reader.bos_id, reader.end_id)


def test_an_encoder_reads_the_question_and_a_decoder_writes_the_answer():
    texts = question_texts("t5")
    made = QuestionCollate(transform, texts)([("picture", "which digit is red ?", "3")])
    assert set(made) == {"image_BCHW", "question_ids_BK", "question_mask_BK", *IN_AND_OUT}
    assert texts.language.decode(made["input_ids_BL"][0]) == "question : which digit is red ? short answer :"
    assert texts.language.decode(made["output_ids_BT"][0]) == "3" and made["output_ids_BT"][0, -1] == texts.language.end_id


def test_an_answer_is_drawn_as_often_as_annotators_gave_it():
    collate = QuestionCollate(transform, question_texts("opt"))
    sample = question(answers=("red",) * 7 + ("blue",) * 3)
    drawn = Counter(collate.load(sample, random.Random(seed))[2] for seed in range(1000))
    assert drawn["red"] + drawn["blue"] == 1000 and 650 < drawn["red"] < 750
    assert collate.load(sample, random.Random(3))[1:] == collate.load(sample, random.Random(3))[1:]


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_a_question_that_is_too_long_loses_its_last_words_and_never_its_answer(family):
    made = question_texts(family, max_txt_len=12).answered(["which digit is left of a blue digit ?"], ["a blue 7"])
    words = tokenizer(family)
    read, written = (made["input_ids_BL"], made["output_ids_BT"]) if family == "t5" else (made["text_ids_BL"],) * 2
    assert read.shape[1] <= 12
    kept = "which digit is left of" if family == "t5" else "which digit"
    assert words.decode(read[0]).startswith(f"question : {kept} short answer :")
    assert words.decode(written[0]).endswith("a blue 7") and written[0, -1] == words.end_id


def test_a_prompt_without_room_for_a_question_is_refused():
    with pytest.raises(UserError, match=r"task\.max_txt_len=8 leaves no room for a question and an answer"):
        question_texts("opt", max_txt_len=8)
