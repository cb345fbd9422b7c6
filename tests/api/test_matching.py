"""A stage-1 model from Python: vectors, scores, losses and captions."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image

import blip2x
from blip2x.errors import UserError

KINDS = ["retrieval", "lavis"]  # without the head that writes captions, and with it
SIZES = {"retrieval": {"P": 10, "V": 16, "D": 18, "E": 11}, "lavis": {"P": 10, "V": 16, "D": 18, "E": 14}}
TEXTS = ["word3 word8 word1 word20", "word7", "word11 word2"]
ENDS = {"eos_token_id": 35, "pad_token_id": 0}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def pairs(pixels):
    """`pairs(kind)`: four images with texts of unequal lengths, padded on the right."""

    def make(kind: str) -> dict[str, np.ndarray]:
        mask = (np.arange(6) < np.array([6, 3, 4, 2])[:, None]).astype(np.int64)
        ids = np.random.default_rng(1).integers(4, 34, [4, 6]) * mask
        ids[:, 0] = 2
        return {"pixel_values": pixels(kind, 4), "input_ids": ids, "attention_mask": mask}

    return make


def text(pair: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: pair[key] for key in ("input_ids", "attention_mask")}


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


# vectors and scores


def test_features(kind, load, pixels):
    model, _ = load(kind)
    size, image = SIZES[kind], pixels(kind, 3)
    shapes = {"queries": (3, 5, size["D"]), "patches": (3, size["P"], size["V"]), "projected": (3, 5, size["E"])}
    for output, shape in shapes.items():
        array = model.encode_image(pixel_values=image, output=output)
        assert isinstance(array, np.ndarray) and (array.shape, array.dtype) == (shape, np.float32)
        np.testing.assert_array_equal(model.encode_image(pixel_values=image, output=output), array)  # no dropout
    np.testing.assert_allclose(np.linalg.norm(array, axis=-1), 1, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(
        model.encode_image(pixel_values=image), model.encode_image(pixel_values=image, output="queries")
    )
    with pytest.raises(UserError, match=r"^output='pooled' is none of queries, patches, projected$"):
        model.encode_image(pixel_values=image, output="pooled")


def test_texts_become_unit_vectors(kind, load, pairs):
    model, _ = load(kind)
    pair = pairs(kind)
    array = model.encode_text(**text(pair))
    assert (array.shape, array.dtype) == ((4, SIZES[kind]["E"]), np.float32)
    np.testing.assert_allclose(np.linalg.norm(array, axis=-1), 1, rtol=0, atol=1e-6)
    alone = model.encode_text(input_ids=pair["input_ids"][1:2, :3])  # everything counts without a mask
    np.testing.assert_allclose(alone, array[1:2], rtol=0, atol=1e-5)
    unmasked = model.encode_text(input_ids=pair["input_ids"])
    assert np.abs(unmasked - array)[1:].max() > 1e-3


def test_similarities_are_of_the_best_query(kind, load, pairs):
    model, _ = load(kind)
    pair = pairs(kind)
    three = pair | {"pixel_values": pair["pixel_values"][:3]}  # images and texts need not be as many
    found = model.itc(**three)
    assert (found.shape, found.dtype) == ((3, 4), np.float32) and np.abs(found).max() <= 1
    image = model.encode_image(pixel_values=three["pixel_values"], output="projected")
    each = np.stack([image @ vector for vector in model.encode_text(**text(pair))], axis=-1)  # [B, Q, N]
    np.testing.assert_allclose(found, each.max(axis=1), rtol=0, atol=1e-6)


def test_matching_is_of_pairs(kind, load, pairs):
    model, _ = load(kind)
    pair = pairs(kind)
    logits = model.itm(**pair)
    assert (logits.shape, logits.dtype) == ((4, 2), np.float32)
    last = model.itm(**{key: array[3:] for key, array in pair.items()})
    np.testing.assert_allclose(last, logits[3:], rtol=0, atol=1e-5)
    other = model.itm(**pair | {"pixel_values": pair["pixel_values"][::-1]})
    assert np.abs(other - logits).max() > 1e-3
    with pytest.raises(UserError, match=r"^3 images and 4 texts are no pairs; give as many of both$"):
        model.itm(**pair | {"pixel_values": pair["pixel_values"][:3]})


def test_texts_and_pictures_are_what_the_processor_makes_of_them(kind, load, pictures):
    model, processor = load(kind)
    arrays = processor(pictures, TEXTS)
    assert arrays["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]  # [CLS], words, [SEP]
    assert (arrays["input_ids"][:, 0] == processor.tokenizer.bos_id).all()
    np.testing.assert_array_equal(model.encode_text(TEXTS), model.encode_text(**text(arrays)))
    np.testing.assert_array_equal(model.encode_text(TEXTS[0]), model.encode_text([TEXTS[0]]))
    np.testing.assert_array_equal(model.itc(pictures, TEXTS), model.itc(**arrays))
    np.testing.assert_array_equal(model.itm(pictures, TEXTS), model.itm(**arrays))
    paddle.seed(0)
    losses = model(pictures, TEXTS)
    paddle.seed(0)
    assert {name: float(loss) for name, loss in losses.items()} == {n: float(loss) for n, loss in model(**arrays).items()}
    grey = pictures[1].convert("L")
    np.testing.assert_array_equal(model.encode_image(grey), model.encode_image(grey.convert("RGB")))


def test_without_a_tokenizer(kind, load, pairs):
    named, _ = load(kind)
    model, processor = load(kind, with_tokenizer=False)
    assert processor is None
    np.testing.assert_array_equal(model.itc(**pairs(kind)), named.itc(**pairs(kind)))
    for ask in (model.encode_text, lambda texts: model.itc(pixel_values=pairs(kind)["pixel_values"], texts=texts)):
        with pytest.raises(UserError, match=r"has no tokenizer, as none came with .*; give input_ids= in place of texts=$"):
            ask(TEXTS)


# losses


def test_losses_and_their_gradients(load, pairs):
    model, _ = load("lavis")
    paddle.seed(0)
    parts = model(**pairs("lavis"))
    assert parts.keys() == {"loss", "itc", "itm", "itg"}
    np.testing.assert_allclose(float(parts["loss"]), sum(float(parts[name]) for name in ("itc", "itm", "itg")), rtol=1e-6)
    parts["loss"].backward()
    trained = dict(model.network.named_parameters())
    for name in ("qformer.query_tokens", "vision_proj.weight", "text_proj.weight", "itm_head.weight", "temp"):
        assert np.abs(trained[name].grad.numpy()).max() > 0, name
    assert trained["vision.blocks.0.fc1.weight"].grad is None  # frozen, as in the recipe
    for parameter in trained.values():
        parameter.clear_gradient()


def test_negatives_that_are_given_are_matched(kind, load, pairs):
    """Of each pair, of its text with the image that is given, and of its image with such a text."""
    model, _ = load(kind)
    pair, images, texts = pairs(kind), np.array([2, 3, 1, 0]), np.array([1, 0, 3, 2])
    parts = model(**pair, negatives=(images, texts))
    again = model(**pair, negatives=(images.tolist(), texts.tolist()))
    assert {name: float(loss) for name, loss in parts.items()} == {name: float(loss) for name, loss in again.items()}
    one = np.arange(4)
    columns = [(one, one, 1), (images, one, 0), (one, texts, 0)]
    chosen = []
    for image, words, label in columns:
        mixed = {"pixel_values": pair["pixel_values"][image], **{key: array[words] for key, array in text(pair).items()}}
        chosen.append(softmax(model.itm(**mixed))[:, label])
    np.testing.assert_allclose(float(parts["itm"]), -np.log(np.concatenate(chosen)).mean(), rtol=0, atol=1e-5)


def test_pairs_of_one_image_are_no_negatives(kind, load, pairs):
    """Where all are, only the pairs themselves are left to match, and contrast wants them equally similar."""
    model, _ = load(kind)
    pair = pairs(kind)
    parts = model(**pair, image_ids=[5] * 4, label_smoothing=0.0)
    matched = -np.log(softmax(model.itm(**pair))[:, 1]).mean()
    np.testing.assert_allclose(float(parts["itm"]), matched, rtol=0, atol=1e-5)
    temperature = float(model.network.temp)
    similar = model.itc(**pair) / temperature
    sides = [-np.log(softmax(scores)).mean() for scores in (similar, similar.T)]
    np.testing.assert_allclose(float(parts["itc"]), np.mean(sides), rtol=1e-4)
    alone = model(**pair, image_ids=np.array([1, 2, 3, 4]), label_smoothing=0.0)
    wanted = [-np.log(np.diag(softmax(scores))).mean() for scores in (similar, similar.T)]
    np.testing.assert_allclose(float(alone["itc"]), np.mean(wanted), rtol=1e-4)
    default = model(**pair, label_smoothing=0.0)
    assert float(default["itc"]) == float(alone["itc"])  # all differ


def test_label_smoothing_is_of_contrast_and_captions(kind, load, pairs):
    model, _ = load(kind)
    asked = {**pairs(kind), "negatives": (np.array([1, 2, 3, 0]), np.array([1, 2, 3, 0]))}
    usual, smooth, sharp = model(**asked), model(**asked, label_smoothing=0.1), model(**asked, label_smoothing=0.0)
    for name in ("itc", "itm", "itg"):
        assert float(usual[name]) == float(smooth[name])
        assert (float(sharp[name]) == float(smooth[name])) == (name == "itm"), name


def test_a_single_pair(kind, load, pairs):
    model, _ = load(kind)
    parts = model(**{key: array[:1] for key, array in pairs(kind).items()})
    assert all(np.isfinite(float(loss)) for loss in parts.values())


IDS = [[2, 5, 3], [2, 8, 3]]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neither texts": ({"input_ids": None}, r"^give either texts= or input_ids=, and not both$"),
    "both texts": ({"texts": TEXTS[:2]}, r"^give either texts= or input_ids=, and not both$"),
    "no texts": ({"input_ids": None, "texts": []}, r"^texts=\[\]: give a text, or a list of at least one$"),
    "neither images": ({"pixel_values": None}, r"^give either images= .* or pixel_values= .*, and not both$"),
    "both images": ({"images": Image.new("RGB", (9, 9))}, r"^give either images= .*, and not both$"),
    "larger": ({"pixel_values": np.zeros([2, 3, 16, 16])}, r"^pixel_values has shape \[2, 3, 16, 16\], .* \[B, 3, 15, 15\]$"),
    "one more": ({"pixel_values": np.zeros([3, 3, 15, 15])}, r"^3 images and 2 texts are no pairs"),
    "one axis": ({"input_ids": IDS[0]}, r"^input_ids has shape \[3\]"),
    "unknown word": ({"input_ids": [[2, 37], [2, 5]]}, r"^input_ids holds 2 to 37, but this model's vocabulary is 0 to 36$"),
    "mask": ({"attention_mask": [[1, 1]]}, r"^attention_mask has shape \[1, 2\], but input_ids \[2, 3\]$"),
    "longer": ({"input_ids": [[2] * 13] * 2}, r"^a text of 13 tokens is longer than the Q-Former's 12 positions"),
}
LOSSES_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer ids": ({"image_ids": [1]}, r"^image_ids has shape \[1\] and type int64, but has to be 2 whole numbers$"),
    "names": ({"image_ids": ["a", "b"]}, r"^image_ids has shape \[2\] and type <U1, but has to be 2 whole numbers$"),
    "negatives of more": ({"negatives": ([1, 0, 1], [1, 0])}, r"^negatives has shape \[3\]"),
    "negatives beyond": ({"negatives": ([1, 0], [2, 0])}, r"^negatives holds 0 to 2, but the places of 2 pairs are 0 to 1$"),
    "negative negatives": ({"negatives": ([1, -1], [1, 0])}, r"^negatives holds -1 to 1"),
}


@pytest.mark.parametrize("case", [*REFUSED, *LOSSES_REFUSED])
def test_refused_in_a_sentence(case, load):
    model, _ = load("retrieval")
    options, sentence = (REFUSED | LOSSES_REFUSED)[case]
    asked = {"pixel_values": np.zeros([2, 3, 15, 15]), "input_ids": IDS, **options}
    for ask in [model] if case in LOSSES_REFUSED else [model, model.itm, model.itc]:
        if ask == model.itc and case == "one more":
            continue
        with pytest.raises(UserError, match=sentence):
            ask(**asked)


# captions


def test_hugging_faces_weights_write_no_captions(load, pixels):
    with pytest.raises(UserError, match=r"^these weights have no head to write captions with; take a LAVIS stage-1 file"):
        load("retrieval")[0].generate(pixel_values=pixels("retrieval", 1), **ENDS)


def test_captions_as_ids(load, pixels, seen):
    model, _ = load("lavis", with_tokenizer=False)
    image = pixels("lavis", 3)
    with pytest.raises(UserError, match=r"no tokenizer, as none came with its weights; give eos_token_id= and pad_token_id=$"):
        model.generate(pixel_values=image, eos_token_id=35)
    ids = model.generate(pixel_values=image, **ENDS, max_new_tokens=6)
    assert ids.dtype == np.int64 and ids.shape[0] == 3 and ids.shape[1] <= 6 and ids.max() < 37
    out = model.generate(pixel_values=image, **ENDS, max_new_tokens=6, num_beams=3, num_return_sequences=2, return_output=True)
    assert out.texts is None and out.scores.shape == (6,) and len(out.ids) == 6
    assert (np.diff(out.scores.reshape(3, 2), axis=1) <= 0).all()
    assert seen == [3, 3]  # each image once


def test_captions_as_texts(load, pixels):
    model, processor = load("lavis")
    asked = {"pixel_values": pixels("lavis", 3), "max_new_tokens": 6}
    out = model.generate(**asked, return_output=True)
    assert model.generate(**asked) == out.texts == processor.batch_decode(out.ids) and len(out.texts) == 3
    words = processor.tokenizer
    bare, _ = load("lavis", with_tokenizer=False)
    np.testing.assert_array_equal(bare.generate(**asked, eos_token_id=words.end_id, pad_token_id=words.pad_id), out.ids)
    paddle.seed(0)
    drawn = [model.generate(**asked, do_sample=True, temperature=3.0, num_return_sequences=4)]
    paddle.seed(0)
    drawn.append(model.generate(**asked, do_sample=True, temperature=3.0, num_return_sequences=4))
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 3


def test_captions_longer_than_the_positions_are_refused(load, pixels):
    with pytest.raises(UserError, match=r"is longer than the Q-Former's 11 positions"):
        load("lavis", with_tokenizer=False)[0].generate(pixel_values=pixels("lavis", 1), eos_token_id=10**6, pad_token_id=0)


def test_what_the_weights_lack_is_random_in_the_same_way(named):
    """And a program's own random numbers go on as if nothing had been loaded."""
    heads, drawn = [], []
    for seed in (1, 2):
        paddle.seed(seed)
        with pytest.warns(UserWarning, match="no head"):
            model, _ = blip2x.load(named("retrieval"))
        drawn.append(paddle.rand([3]).numpy())
        paddle.seed(seed)
        np.testing.assert_array_equal(paddle.rand([3]).numpy(), drawn[-1])
        heads.append(model.network.qformer.text.head_transform.weight.numpy())
    np.testing.assert_array_equal(*heads)
    assert heads[0].std() > 0 and (drawn[0] != drawn[1]).any()
