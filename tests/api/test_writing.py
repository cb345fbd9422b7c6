"""A stage-2 model from Python: what it reads and gives, and that options mean what they say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image

import blip2x
from blip2x.api.writing import Generated
from blip2x.errors import UserError
from blip2x.tasks.common.conversation import prompt_room
from blip2x.tasks.common.weights import CLIP_NORMALISATION

KINDS = ["opt", "t5"]
WIDTHS = {"opt": 18, "t5": 16}
ENDS = {"opt": 2, "t5": 1}
SHORT = {"max_new_tokens": 6}
PROMPTS = ["word3 word8 word1 word20", "word7", "word11 word2"]


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


# images


def test_features(kind, load, pixels):
    model, _ = load(kind)
    image = pixels(kind, 3)
    shapes = {"queries": (3, 5, 24), "patches": (3, 10, 20), "projected": (3, 5, WIDTHS[kind])}
    for output, shape in shapes.items():
        array = model.encode_image(pixel_values=image, output=output)
        assert isinstance(array, np.ndarray) and (array.shape, array.dtype) == (shape, np.float32)
        np.testing.assert_array_equal(model.encode_image(pixel_values=image, output=output), array)  # no dropout
        one = model.encode_image(pixel_values=image[1:2], output=output)
        np.testing.assert_allclose(one, array[1:2], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(
        model.encode_image(pixel_values=image), model.encode_image(pixel_values=image, output="queries")
    )


def test_pictures_and_the_processors_arrays_are_the_same(load, pictures):
    model, processor = load("opt")
    arrays = processor(pictures)["pixel_values"]
    np.testing.assert_array_equal(model.encode_image(pictures), model.encode_image(pixel_values=arrays))
    np.testing.assert_array_equal(model.encode_image(pictures[0]), model.encode_image(pixel_values=arrays[:1]))
    assert model.generate(pictures, **SHORT) == model.generate(pixel_values=arrays, **SHORT)
    alone, _ = load("opt", with_tokenizer=False)  # reads pictures as well
    np.testing.assert_array_equal(alone.encode_image(pictures), model.encode_image(pictures))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_all_kinds_become_rgb(mode, load, pictures):
    model, processor = load("opt")
    picture = pictures[1].convert(mode)
    assert picture.mode == mode
    np.testing.assert_array_equal(model.encode_image(picture), model.encode_image(picture.convert("RGB")))
    np.testing.assert_array_equal(processor(picture)["pixel_values"], processor(picture.convert("RGB"))["pixel_values"])


# prompts


def test_texts_ids_and_scores(kind, load, pixels):
    model, processor = load(kind)
    asked = {"pixel_values": pixels(kind, 3), "prompt": PROMPTS, **SHORT}
    texts, out = model.generate(**asked), model.generate(**asked, return_output=True)
    assert isinstance(texts, list) and len(texts) == 3 and all(isinstance(text, str) for text in texts)
    assert isinstance(out, Generated) and out.texts == texts == processor.batch_decode(out.ids)
    assert out.ids.dtype == np.int64 and out.ids.shape[0] == 3 and out.ids.shape[1] <= 6 + (kind == "t5")
    assert out.scores.shape == (3,) and out.scores.dtype == np.float32 and (out.scores < 0).all()
    if kind == "t5":
        assert (out.ids[:, 0] == 0).all()


def test_prompts_are_what_the_processor_makes_of_them(kind, load, pixels):
    model, processor = load(kind)
    arrays = processor(text=PROMPTS)
    image = pixels(kind, 3)
    ids = model.generate(pixel_values=image, **arrays, **SHORT)
    out = model.generate(pixel_values=image, prompt=PROMPTS, **SHORT, return_output=True)
    np.testing.assert_array_equal(ids, out.ids)
    also = model.generate(pixel_values=image, **arrays, **SHORT, return_output=True)
    assert also.texts == out.texts
    np.testing.assert_array_equal(also.scores, out.scores)


def test_without_a_tokenizer_ids_come_and_go(kind, load, pixels):
    named, processor = load(kind)
    model, _ = load(kind, with_tokenizer=False)
    asked = {"pixel_values": pixels(kind, 3), **processor(text=PROMPTS), **SHORT, "eos_token_id": 7}
    np.testing.assert_array_equal(model.generate(**asked), named.generate(**asked))
    out = model.generate(**asked, return_output=True)
    assert out.texts is None
    np.testing.assert_array_equal(out.ids, model.generate(**asked))
    captions = model.generate(pixel_values=asked["pixel_values"], **SHORT)
    assert isinstance(captions, np.ndarray) and len(captions) == 3
    with pytest.raises(UserError, match=r"has no tokenizer, as none came with .*; give input_ids= in place of prompt=$"):
        model.generate(pixel_values=asked["pixel_values"], prompt="word1")


def test_no_prompt_is_the_empty_one(kind, load, pixels):
    model, _ = load(kind)
    image = pixels(kind, 2)
    plain = model.generate(pixel_values=image, **SHORT, return_output=True)
    for other in ({"prompt": ""}, {"prompt": ["", "  "]}, {"input_ids": np.array([[ENDS[kind]]])}):
        found = model.generate(pixel_values=image, **other, **SHORT, return_output=True)
        np.testing.assert_array_equal(found.ids, plain.ids)
        np.testing.assert_allclose(found.scores, plain.scores, rtol=0, atol=1e-5)


def test_several_prompts_for_one_image_which_is_encoded_once(kind, load, pixels, seen):
    """Each is answered as if it were alone, though it is padded to the longest."""
    model, _ = load(kind)
    image = pixels(kind, 1)
    out = model.generate(pixel_values=image, prompt=PROMPTS, **SHORT, num_beams=2, return_output=True)
    assert seen == [1]
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(pixel_values=image, prompt=prompt, **SHORT, num_beams=2, return_output=True)
        assert alone.texts == [out.texts[row]]
        np.testing.assert_allclose(alone.scores, out.scores[row : row + 1], rtol=0, atol=1e-5)
    assert len(set(out.texts)) == 3


def test_one_prompt_for_several_images(kind, load, pixels, seen):
    model, _ = load(kind)
    image = pixels(kind, 3)
    out = model.generate(pixel_values=image, prompt=PROMPTS[0], **SHORT, return_output=True)
    assert seen == [3]
    each = model.generate(pixel_values=image, prompt=[PROMPTS[0]] * 3, **SHORT, return_output=True)
    np.testing.assert_array_equal(out.ids, each.ids)


def test_everything_counts_without_a_mask(kind, load, pixels):
    model, _ = load(kind, with_tokenizer=False)
    ids = np.array([[5, 9, 30, ENDS[kind]], [8, 40, 6, ENDS[kind]]])
    asked = {"pixel_values": pixels(kind, 2), "input_ids": ids, **SHORT, "return_output": True}
    plain = model.generate(**asked)
    every = model.generate(**asked, attention_mask=np.ones_like(ids))
    np.testing.assert_array_equal(plain.ids, every.ids)
    some = model.generate(**asked, attention_mask=np.array([[0, 0, 1, 1]] * 2))
    assert np.abs(some.scores - plain.scores).max() > 1e-3


def test_hugging_faces_placeholders_are_left_out(kind, load, named, pixels):
    """Its processor puts one per query before the prompt, where the queries are here; another number are words."""
    model, processor = load(kind)
    token = json.loads((named(kind) / "config.json").read_text())["image_token_index"]
    arrays, image = processor(text=PROMPTS), pixels(kind, 3)
    places = np.full([3, 5], token)
    ids = np.concatenate([places, arrays["input_ids"]], axis=1)
    mask = np.concatenate([np.ones_like(places), arrays["attention_mask"]], axis=1)
    out = model.generate(pixel_values=image, input_ids=ids, attention_mask=mask, **SHORT, return_output=True)
    plain = model.generate(pixel_values=image, **arrays, **SHORT, return_output=True)
    np.testing.assert_array_equal(out.ids, plain.ids)
    np.testing.assert_allclose(out.scores, plain.scores, rtol=0, atol=1e-5)
    fewer = model.generate(pixel_values=image, input_ids=ids[:, 1:], attention_mask=mask[:, 1:], **SHORT, return_output=True)
    assert np.abs(fewer.scores - plain.scores).max() > 1e-3


# ends and padding

MANY = {"do_sample": True, "temperature": 5.0, "num_return_sequences": 24, "max_new_tokens": 10, "return_output": True}


def drawn(model: Any, image: np.ndarray, **options: Any) -> np.ndarray:
    """Texts of almost any tokens, the same at each call."""
    paddle.seed(1)
    return model.generate(pixel_values=image, **MANY, **options).ids


def test_the_end_and_the_padding_that_are_asked_for(kind, load, pixels):
    model, _ = load(kind)
    asked = {"pixel_values": pixels(kind, 3), "prompt": PROMPTS, "max_new_tokens": 10, "return_output": True}
    free = model.generate(**asked, eos_token_id=10**6).ids  # which never comes
    start = int(kind == "t5")
    assert free.shape == (3, 10 + start)
    end = next(int(token) for token in free[0, start:] if token not in free[1])
    count = free[0].tolist().index(end) + 1
    ids = model.generate(**asked, eos_token_id=end, pad_token_id=33).ids
    np.testing.assert_array_equal(ids[0, :count], free[0, :count])
    assert (ids[0, count:] == 33).all() and count < ids.shape[1]
    np.testing.assert_array_equal(ids[1], free[1])


@pytest.mark.parametrize("said", ["text", "generation", "tokenizer", "family"])
def test_where_the_end_and_the_padding_come_from(said, kind, load, named, edited, pixels):
    """The language model's own config, else generation_config.json, the tokenizer, or what is usual in the family."""
    words = load(kind)[1].tokenizer
    wanted = {"text": (13, 14), "generation": (11, 12), "tokenizer": (words.end_id, words.pad_id)}
    end, pad = wanted.get(said, {"opt": (2, 1), "t5": (1, 0)}[kind])
    text = json.loads((named(kind) / "config.json").read_text())["text_config"]
    text = {key: value for key, value in text.items() if key not in ("eos_token_id", "pad_token_id")}
    if said == "text":
        text |= {"eos_token_id": 13, "pad_token_id": 14}
    has_generation = said in ("text", "generation")
    generation = {"eos_token_id": [11, 2], "pad_token_id": 12} if has_generation else None  # of several ends the first
    folder = edited(kind, tokenizer=said != "family", generation_config=generation, config={"text_config": text})
    by_itself = drawn(blip2x.load(folder)[0], pixels(kind, 2))
    np.testing.assert_array_equal(by_itself, drawn(load(kind)[0], pixels(kind, 2), eos_token_id=end, pad_token_id=pad))
    assert ((by_itself[:, 1:-1] == end) & (by_itself[:, 2:] == pad)).any()


# options


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"do_sample": True, "temperature": 3.0}])
def test_results_of_a_prompt_stand_together(options, kind, load, pixels):
    model, _ = load(kind)
    paddle.seed(0)
    asked = {"pixel_values": pixels(kind, 2), "prompt": PROMPTS[:2], **options, **SHORT, "return_output": True}
    out = model.generate(**asked, num_return_sequences=3)
    assert len(out.texts) == len(out.ids) == len(out.scores) == 6 and len(set(out.texts)) > 3
    if "num_beams" in options:  # the best first
        assert (np.diff(out.scores.reshape(2, 3), axis=1) <= 0).all()
        best = model.generate(**asked)
        assert best.texts == [out.texts[0], out.texts[3]]
        np.testing.assert_allclose(best.scores, out.scores[[0, 3]], rtol=0, atol=1e-5)
    for row in range(2):
        alone = {"pixel_values": asked["pixel_values"][row : row + 1], "prompt": PROMPTS[row]}
        likely = model.generate(**{**asked, **alone}, num_return_sequences=3)
        if "num_beams" in options:
            assert likely.texts == out.texts[3 * row : 3 * row + 3]


def test_sampling_is_repeatable(kind, load, pixels):
    model, _ = load(kind)
    first, again = (drawn(model, pixels(kind, 2)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    paddle.seed(2)
    other = model.generate(pixel_values=pixels(kind, 2), **MANY).ids
    assert first.shape != other.shape or (first != other).any()


def test_lengths_count_new_tokens(kind, load, pixels):
    model, _ = load(kind)
    asked = {"pixel_values": pixels(kind, 3), "prompt": PROMPTS, "return_output": True}
    start = int(kind == "t5")
    always = {"eos_token_id": int(model.generate(**asked, max_new_tokens=1).ids[0, start])}  # the first row ends at once
    assert model.generate(**asked, max_new_tokens=1).ids.shape == (3, 1 + start)
    for least in (2, 4):
        ids = model.generate(**asked, **always, max_new_tokens=5, min_new_tokens=least, num_beams=2).ids
        assert ids.shape[1] <= 5 + start and not (ids[:, start : start + least - 1] == always["eos_token_id"]).any()


def test_options_change_what_is_written(kind, load, pixels):
    model, _ = load(kind)
    asked = {"pixel_values": pixels(kind, 3), "max_new_tokens": 12, "eos_token_id": 10**6, "return_output": True}
    greedy = model.generate(**asked)
    np.testing.assert_array_equal(model.generate(**asked, do_sample=True, top_k=1).ids, greedy.ids)
    np.testing.assert_array_equal(model.generate(**asked, do_sample=True, top_p=1e-6).ids, greedy.ids)
    penalised = model.generate(**asked, repetition_penalty=50.0)
    fewest = [min(len(set(row[1:])) for row in ids.tolist()) for ids in (greedy.ids, penalised.ids)]
    assert fewest[1] > fewest[0]
    long = model.generate(**asked, num_beams=3, length_penalty=2.0)
    short = model.generate(**asked, num_beams=3, length_penalty=0.0)
    np.testing.assert_array_equal(long.ids, short.ids)  # all are of one length
    np.testing.assert_allclose(long.scores, short.scores / 12**2, rtol=1e-5)


# what is refused

IMAGE = np.zeros([2, 3, 12, 12], np.float32)
IDS = np.array([[2, 5, 7], [2, 8, 9]])
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"pixel_values": None}, r"^give either images= .* or pixel_values= .*, and not both$"),
    "both images": ({"images": [Image.new("RGB", (9, 9))]}, r"^give either images= .*, and not both$"),
    "empty list": ({"pixel_values": None, "images": []}, r"^images= takes a PIL picture or several"),
    "paths": ({"pixel_values": None, "images": ["a.png"]}, r"^images= takes a PIL picture or several"),
    "larger": ({"pixel_values": np.zeros([1, 3, 13, 12])}, r"^pixel_values has shape \[1, 3, 13, 12\], .* \[B, 3, 12, 12\]$"),
    "no batch": ({"pixel_values": IMAGE[0]}, r"^pixel_values has shape \[3, 12, 12\]"),
    "last channels": ({"pixel_values": IMAGE.transpose(0, 2, 3, 1)}, r"^pixel_values has shape \[2, 12, 12, 3\]"),
    "both prompts": ({"prompt": "word1", "input_ids": IDS}, r"^give either prompt= or input_ids=, and not both$"),
    "three prompts": ({"prompt": PROMPTS}, r"^2 images and 3 prompts: give one for all, or as many of both$"),
    "three rows": ({"input_ids": np.ones([3, 2], int)}, r"^2 images and 3 prompts"),
    "no prompts": ({"prompt": []}, r"^texts=\[\]: give a text, or a list of at least one$"),
    "numbers for texts": ({"prompt": [1, 2]}, r"^texts=\[1, 2\]: give a text"),
    "one axis": ({"input_ids": IDS[0]}, r"^input_ids has shape \[3\] and type int64, but has to be whole numbers \[B, L\]$"),
    "halves": ({"input_ids": IDS / 2}, r"^input_ids has shape \[2, 3\] and type float64"),
    "nothing": ({"input_ids": IDS[:, :0]}, r"^input_ids has shape \[2, 0\]"),
    "unknown word": ({"input_ids": IDS + 43}, r"^input_ids holds 45 to 52, but this model's vocabulary is 0 to 49$"),
    "negative": ({"input_ids": IDS - 5}, r"^input_ids holds -3 to 4"),
    "mask": ({"input_ids": IDS, "attention_mask": IDS[:, :2]}, r"^attention_mask has shape \[2, 2\], but input_ids \[2, 3\]$"),
    "results": ({"num_beams": 2, "num_return_sequences": 3}, r"^num_return_sequences=3 is more than num_beams=2 can return$"),
    "greedy results": ({"num_return_sequences": 2}, r"^greedy decoding has one result, not num_return_sequences=2"),
    "no tokens": ({"max_new_tokens": 0}, r"^max_new_tokens must be at least 1, got 0$"),
    "least above most": ({"min_new_tokens": 9, "max_new_tokens": 8}, r"^min_new_tokens must lie in 0 to max_new_tokens=8"),
    "share": ({"top_p": 0.0}, r"^top_p must be above 0"),
    "temperature": ({"temperature": 0.0}, r"^temperature must be above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case, load, seen):
    options, sentence = REFUSED[case]
    model, _ = load("opt")
    with pytest.raises(UserError, match=sentence):
        model.generate(**{"pixel_values": IMAGE, **options})


def test_texts_longer_than_opts_positions_are_refused(load):
    model, _ = load("opt")
    with pytest.raises(UserError, match=r"is longer than OPT's 32 positions"):
        model.generate(pixel_values=IMAGE, prompt="word1 " * 40)


def test_an_unknown_output_is_refused(kind, load, pixels):
    with pytest.raises(UserError, match=r"^output='pooled' is none of queries, patches, projected$"):
        load(kind)[0].encode_image(pixel_values=pixels(kind, 1), output="pooled")


# the processor


def test_the_processors_arrays(load, pictures):
    opt, t5 = load("opt")[1], load("t5")[1]
    arrays = opt(pictures, PROMPTS)
    assert set(arrays) == {"pixel_values", "input_ids", "attention_mask"}
    assert (arrays["pixel_values"].shape, arrays["pixel_values"].dtype) == ((3, 3, 12, 12), np.float32)
    assert arrays["input_ids"].shape == arrays["attention_mask"].shape == (3, 5)
    assert arrays["input_ids"].dtype == arrays["attention_mask"].dtype == np.int64
    assert arrays["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]  # on the left
    assert arrays["input_ids"][:, -1].tolist() == [opt.tokenizer.tokens(text)[-1] for text in PROMPTS]  # left open
    assert arrays["input_ids"][1, 3] == opt.tokenizer.bos_id
    arrays = t5(text=PROMPTS)
    assert set(arrays) == {"input_ids", "attention_mask"}
    assert arrays["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert arrays["input_ids"][1, :2].tolist() == [*t5.tokenizer.tokens(PROMPTS[1]), 1]
    assert set(t5(pictures[0])) == {"pixel_values"} and t5(pictures[0])["pixel_values"].shape == (1, 3, 12, 12)
    assert t5(text="word1")["input_ids"].shape == (1, 2)


def test_ids_become_texts_without_special_tokens(load):
    processor = load("opt")[1]
    words = processor.tokenizer
    ids = [[words.bos_id, *words.tokens("word3 word1"), words.end_id, words.pad_id], words.tokens("word2 " * 5)]
    assert processor.batch_decode(np.array(ids)) == ["word3 word1", "word2 word2 word2 word2 word2"]


def test_pictures_are_normalised_as_the_folder_says(edited, load, pictures):
    """In CLIP's way where it does not say."""
    usual = load("opt")[1](pictures)["pixel_values"]
    folder = edited("opt")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    own = blip2x.load(folder)[1](pictures)["pixel_values"]
    raw = own * 0.25 + 0.5
    assert raw.min() >= 0 and raw.max() <= 1
    mean, std = (np.array(CLIP_NORMALISATION[key], np.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    np.testing.assert_allclose(usual, (raw - mean) / std, rtol=0, atol=2e-6)


# answer


def test_all_questions_about_each_image_that_is_encoded_once(kind, load, pictures, seen):
    model, _ = load(kind)
    questions = ["word3 word8", "word7"]
    answers = model.answer(pictures, questions, prompt="word1 {} word2", num_beams=2, batch_size=4, **SHORT)
    assert sum(seen) == 3
    prompts = [f"word1 {question} word2" for question in questions]
    assert answers == [model.generate([picture], prompt=prompts, num_beams=2, **SHORT) for picture in pictures]
    talk = model.answer(pictures[:1], questions, prompt="word1 {} word2", chat=True, num_beams=2, **SHORT)[0]
    context = f"{prompts[0]} {answers[0][0]}. {prompts[1]}"
    assert talk == [answers[0][0], *model.generate(pictures[:1], prompt=context, num_beams=2, **SHORT)]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_longest_prompt_that_has_room(load, pictures, num_beams):
    model, _ = load("opt")
    language, queries = model.network.language, model.network.qformer.num_queries
    room = prompt_room(language.max_positions, queries, new_tokens=4)
    options = {"num_beams": num_beams, "min_new_tokens": 4, "max_new_tokens": 4}
    assert len(model.generate(pictures[:1], prompt="word1 " * room, **options)) == 1
    with pytest.raises(UserError, match="longer than OPT's"):
        model.generate(pictures[:1], prompt="word1 " * (room + 1), **options)


def test_questions_that_cannot_be_asked(load, pictures):
    model, _ = load("opt")
    for questions, prompt in (([], "{}"), ("word1", "{}"), (["word1"], "word2")):
        with pytest.raises(UserError, match=r"give a list of questions and a prompt with \{\} for each"):
            model.answer(pictures, questions, prompt=prompt)
    with pytest.raises(UserError, match="has no tokenizer"):
        load("opt", with_tokenizer=False)[0].answer(pictures, ["word1"])
