"""Who sees whom in each of the Q-Former's four passes. Numbers are tests/parity's matter."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.qformer.qformer import build_qformer, rows_of

ATOL = 1e-5  # float32 sums in another order, outputs of about 5
IDS = [[3, 4, 5, 6], [7, 8, 9, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]


def texts(*rows: list[int]) -> paddle.Tensor:
    return paddle.to_tensor(rows)


def changed(one: paddle.Tensor, other: paddle.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("rows", [1, 2])
def test_shapes(qformer, patches, rows):
    patches, ids, mask = patches[:rows], texts(*IDS)[:rows], texts(*MASK)[:rows]
    query, cache = qformer.encode_image(patches)
    assert query.shape == qformer.encode_pair(patches, ids, mask).shape == [rows, 3, 12]
    assert [tensor.shape for pair in cache for tensor in pair] == [[rows, 2, 3, 6]] * 6
    assert qformer.encode_text(ids, mask).shape == [rows, 12]
    assert qformer.caption_logits(ids, mask, cache).shape == [rows, 4, 17]


@pytest.mark.parametrize(("every", "looking"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_every_nth_layer_looks_at_the_image_from_the_first_on(build, every, looking):
    layers = build(depth=4, cross_attention_every=every).layers
    assert [index for index, layer in enumerate(layers) if layer.cross_attention is not None] == looking
    assert {layers[index].cross_attention.key.weight.shape[0] for index in looking} == {10}


def test_padding_changes_nothing(qformer, patches):
    """A text alone, and the same one in a batch behind whose end any token stands."""
    _, cache = qformer.encode_image(patches[:1])
    ids, mask, short = texts([3, 4, 5, 11, 12]), texts([1, 1, 1, 0, 0]), texts([3, 4, 5])
    ones = paddle.ones_like(short)
    for padded, plain in (
        (qformer.encode_text(ids, mask), qformer.encode_text(short, ones)),
        (qformer.encode_pair(patches[:1], ids, mask), qformer.encode_pair(patches[:1], short, ones)),
        (qformer.caption_logits(ids, mask, cache)[:, :3], qformer.caption_logits(short, ones, cache)),
    ):
        assert changed(padded, plain) < ATOL and plain.abs().max() > 1


def test_rows_do_not_mix(qformer, patches):
    ids, mask = texts(*IDS), texts(*MASK)
    query, cache = qformer.encode_image(patches)
    captions, pair = qformer.caption_logits(ids, mask, cache), qformer.encode_pair(patches, ids, mask)
    one_query, one_cache = qformer.encode_image(patches[1:])
    assert changed(query[1:], one_query) < ATOL
    assert changed(captions[1:], qformer.caption_logits(ids[1:], mask[1:], one_cache)) < ATOL
    assert changed(pair[1:], qformer.encode_pair(patches[1:], ids[1:], mask[1:])) < ATOL


def test_several_texts_may_share_each_image(qformer, patches):
    ids, mask = texts(*IDS, *IDS[::-1]), texts(*MASK, *MASK[::-1])
    shared = qformer.encode_pair(patches[:2], ids, mask)
    assert changed(shared, qformer.encode_pair(patches[:2].repeat_interleave(2, axis=0), ids, mask)) < ATOL
    assert changed(shared, qformer.encode_pair(patches[:1], ids, mask)) > 0.1  # the second image has a say


def test_text_alone_sees_what_follows_but_no_queries(qformer):
    ids, ones = texts([3, 4, 5]), paddle.ones([1, 3], dtype="int64")
    before, tokens = qformer.encode_text(ids, ones), qformer.query_tokens.numpy().copy()
    assert changed(before, qformer.encode_text(texts([3, 4, 6]), ones)) > 0.1
    qformer.query_tokens.set_value(tokens + 1 + np.random.default_rng(0).standard_normal(tokens.shape).astype("float32"))
    after = qformer.encode_text(ids, ones)
    qformer.query_tokens.set_value(tokens)
    assert changed(before, after) == 0


def test_in_a_pair_queries_see_the_text_and_the_text_sees_the_image(qformer, patches):
    one, ones = patches[:1], paddle.ones([1, 3], dtype="int64")
    alone, _ = qformer.encode_image(one)
    pair = qformer.encode_pair(one, texts([3, 4, 5]), ones)
    assert changed(pair, alone) > 0.1
    assert changed(pair, qformer.encode_pair(one, texts([3, 4, 6]), ones)) > 0.1
    assert changed(pair, qformer.encode_pair(patches[1:], texts([3, 4, 5]), ones)) > 0.1


def learned(model, image, loss_of) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What `loss_of` squares and adds up, and its gradients, the image's among them."""
    image = image.detach()
    image.stop_gradient = False
    output = loss_of(image)
    (output**2).sum().backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return output.numpy(), {**gradients, "image": image.grad.numpy()}


def assert_alike(model, image, one, other):
    """To the rounding of float32 sums in another order."""
    (output, gradients), (expected, wanted) = learned(model, image, one), learned(model, image, other)
    np.testing.assert_allclose(output, expected, atol=ATOL)
    for name, gradient in wanted.items():
        size = max(1, np.abs(gradient).max())  # some hundreds at most
        np.testing.assert_allclose(gradients.get(name, 0), gradient, atol=ATOL * size, err_msg=name)
    assert np.abs(wanted["image"]).max() > 1


@pytest.mark.parametrize("images", [1, 2])
def test_several_texts_about_an_image_share_its_keys_and_values(qformer, patches, images):
    """As many texts about each, one image's after the other's."""
    ids, mask = texts(*IDS, *IDS[::-1]), texts(*MASK, *MASK[::-1])
    repeats = 4 // images
    assert_alike(
        qformer,
        patches[:images],
        lambda image: qformer.encode_pair(qformer.look(image), ids, mask),
        lambda image: qformer.encode_pair(image.repeat_interleave(repeats, axis=0), ids, mask),
    )


def test_one_look_serves_several_passes(qformer, patches):
    ids, mask = texts(*IDS), texts(*MASK)

    def passes(one, other):
        query, cache = qformer.encode_image(one)
        captions = qformer.caption_logits(ids, mask, cache)
        return paddle.concat([part.flatten() for part in (query, captions, qformer.encode_pair(other, ids, mask))])

    def looked(image):
        seen = qformer.look(image)
        return passes(seen, seen)

    assert_alike(qformer, patches, looked, lambda image: passes(image, image))


def test_rows_of_one_look_are_looks_at_these_images(qformer, patches):
    ids, mask, index = texts(*IDS), texts(*MASK), paddle.to_tensor([1, 1])
    assert_alike(
        qformer,
        patches,
        lambda image: qformer.encode_pair(rows_of(qformer.look(image), index), ids, mask),
        lambda image: qformer.encode_pair(rows_of(image, index), ids, mask),
    )


def test_positions_that_nobody_reads_change_no_gradient(qformer, patches):
    """The last layer computes a pair's queries, or [CLS] of a text alone, as if all were computed and the rest cut off."""
    ids, mask = texts(*IDS), texts(*MASK)

    def passes(image):
        return paddle.concat([qformer.encode_pair(image, ids, mask).flatten(), qformer.encode_text(ids, mask).flatten()])

    def whole(image):
        run = qformer._run
        qformer._run = lambda hidden, *, wanted, **others: (run(hidden, **others)[0][:, :wanted], None)
        try:
            return passes(image)
        finally:
            del qformer._run

    assert_alike(qformer, patches, passes, whole)


def test_the_head_looks_at_the_places_that_are_asked_for(qformer, patches):
    ids, mask, places = texts(*IDS), texts(*MASK), paddle.to_tensor([0, 2, 5])

    def logits(image, place):
        return qformer.caption_logits(ids, mask, qformer.encode_image(image)[1], place)

    assert_alike(
        qformer,
        patches,
        lambda image: logits(image, places),
        lambda image: logits(image, None).flatten(0, 1).index_select(places),
    )


def test_captions_see_the_queries_and_the_tokens_before(qformer, patches):
    ones = paddle.ones([1, 3], dtype="int64")
    _, cache = qformer.encode_image(patches[:1])
    logits, later = (qformer.caption_logits(texts([3, 4, last]), ones, cache) for last in (5, 6))
    assert changed(logits[:, :2], later[:, :2]) < ATOL and changed(logits[:, 2], later[:, 2]) > 0.1
    _, other = qformer.encode_image(patches[1:])
    assert changed(logits[:, 0], qformer.caption_logits(texts([3, 4, 5]), ones, other)[:, 0]) > 0.01


def test_captions_teach_the_queries_through_the_cache(qformer, patches):
    image = patches.detach()
    image.stop_gradient = False
    _, cache = qformer.encode_image(image)
    qformer.caption_logits(texts(*IDS), texts(*MASK), cache)[:, 0, 5].sum().backward()
    assert qformer.query_tokens.grad.abs().max() > 0.01 and image.grad.abs().max() > 0.01
    for parameter in qformer.parameters():
        parameter.clear_gradient()


def test_dropout_acts_in_train_mode_only(build, enliven, patches):
    model = enliven(build(dropout=0.5))
    assert changed(model.encode_image(patches)[0], model.encode_image(patches)[0]) == 0
    model.train()
    assert changed(model.encode_image(patches)[0], model.encode_image(patches)[0]) > 0.1
    assert changed(model.encode_text(texts(*IDS), texts(*MASK)), model.encode_text(texts(*IDS), texts(*MASK))) > 0.1


def test_without_texts_the_same_queries_and_fewer_parameters(qformer, build, patches):
    plain, weights = build(vocab_size=None), dict(qformer.named_parameters())
    names = {name for name, _ in plain.named_parameters()}
    assert weights.keys() - names == {name for name in weights if name.startswith("text.") or ".text_ffn." in name}
    for name, parameter in plain.named_parameters():
        parameter.set_value(weights[name])
    plain.eval()
    np.testing.assert_array_equal(plain.encode_image(patches)[0].numpy(), qformer.encode_image(patches)[0].numpy())


def test_the_longest_text_fits_and_one_token_more_is_one_sentence(qformer):
    longest = paddle.ones([1, 8], dtype="int64")
    qformer.encode_text(longest, longest)
    longer = paddle.ones([1, 9], dtype="int64")
    with pytest.raises(UserError, match="a text of 9 tokens is longer than the Q-Former's 8 positions"):
        qformer.encode_text(longer, longer)


def test_heads_that_do_not_divide_the_width(build):
    with pytest.raises(UserError, match="width 12 of the Q-Former is no multiple of its num_heads 5"):
        build(num_heads=5)


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (48, 0.08)])
def test_fresh_weights_are_bert_s_and_larger_where_sums_are_shorter(build, width, std):
    model = build(width=width, depth=1, num_queries=32)
    for weight in (model.query_tokens, model.text.position_embeddings.weight, model.layers[0].cross_attention.key.weight):
        assert weight.numpy().std() == pytest.approx(std, rel=0.15)
    assert not model.layers[0].text_ffn.fc1.bias.numpy().any() and not model.text.head_bias.numpy().any()


def test_built_from_the_config():
    cfg = compose_config(["model=tiny_opt"]).model.qformer
    model = build_qformer(cfg, vision_width=96, vocab_size=77)
    assert (model.num_queries, model.width, len(model.layers)) == (8, 96, 4)
    assert model.text.word_embeddings.weight.shape == [77, 96] and model.text.position_embeddings.weight.shape == [64, 96]
    assert build_qformer(cfg, vision_width=96, vocab_size=None).text is None


def test_without_the_head_texts_are_read_alike_and_not_written(qformer, build, patches):
    reader, weights = build(writes=False), dict(qformer.named_parameters())
    names = {name for name, _ in reader.named_parameters()}
    assert weights.keys() - names == {name for name in weights if name.startswith("text.head_")}
    for name, parameter in reader.named_parameters():
        parameter.set_value(weights[name])
    reader.eval()
    ids, mask = texts(*IDS), texts(*MASK)
    assert changed(reader.encode_pair(patches, ids, mask), qformer.encode_pair(patches, ids, mask)) == 0
