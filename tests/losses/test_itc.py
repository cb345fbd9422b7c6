"""ITC against float64 NumPy, and where batches of one and repeated images go wrong."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from blip2x.losses.itc import contrast_targets, itc_loss, same_image, similarities


def features(*shape: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def tensors(*arrays: np.ndarray) -> list[paddle.Tensor]:
    return [paddle.to_tensor(array.astype("float32")) for array in arrays]


def reference(image, text, all_image, all_text, ids, all_ids, temperature, smoothing) -> float:
    total = 0.0
    for b in range(len(image)):
        i2t = np.array([max(query @ k for query in image[b]) for k in all_text]) / temperature
        t2i = np.array([max(query @ text[b] for query in k) for k in all_image]) / temperature
        same = np.array([other == ids[b] for other in all_ids])
        target = (1 - smoothing) * same / same.sum() + smoothing / len(all_ids)
        total -= sum(target @ (scores - np.log(np.exp(scores).sum())) for scores in (i2t, t2i)) / 2
    return total / len(image)


def ours(image, text, all_image, all_text, ids, all_ids, temperature, smoothing) -> float:
    i2t, t2i = similarities(*tensors(image, text, all_image, all_text), paddle.to_tensor(temperature))
    same = same_image(paddle.to_tensor(ids), paddle.to_tensor(all_ids))
    return float(itc_loss(i2t, t2i, contrast_targets(same, smoothing)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("ids", "first"), [([1, 2, 3], 0), ([4, 5, 6], 3), ([1, 1, 6], 0)])
def test_loss_of_one_rank_of_two(ids, first, smoothing):
    all_image, all_text = features(6, 4, 8, seed=0), features(6, 8, seed=1)
    all_ids = [1, 2, 3, 4, 5, 6]
    all_ids[first : first + 3] = ids
    rows = slice(first, first + 3)
    arguments = (all_image[rows], all_text[rows], all_image, all_text, ids, all_ids, 0.07, smoothing)
    # float32 noise of scores up to 1 / 0.07
    assert ours(*arguments) == pytest.approx(reference(*arguments), abs=5e-6)


def test_mean_over_ranks_is_the_loss_of_one_process():
    image, text, ids = features(6, 4, 8, seed=0), features(6, 8, seed=1), [1, 2, 3, 1, 5, 6]
    ranks = [ours(image[rows], text[rows], image, text, ids[rows], ids, 0.07, 0.1) for rows in (slice(0, 3), slice(3, 6))]
    assert np.mean(ranks) == pytest.approx(ours(image, text, image, text, ids, ids, 0.07, 0.1), abs=5e-6)


def test_distinct_images_give_the_plain_cross_entropy_with_smoothing():
    i2t, t2i = tensors(np.random.default_rng(2).normal(size=(4, 4)), np.random.default_rng(3).normal(size=(4, 4)))
    ids = paddle.arange(4)
    labels = F.label_smooth(F.one_hot(ids, 4), epsilon=0.1)
    plain = (F.cross_entropy(i2t, labels, soft_label=True) + F.cross_entropy(t2i, labels, soft_label=True)) / 2
    assert float(itc_loss(i2t, t2i, contrast_targets(same_image(ids, ids), 0.1))) == pytest.approx(float(plain), abs=1e-6)


def test_captions_of_one_image_share_the_target():
    ids = paddle.to_tensor([7, 7, 9])
    targets = contrast_targets(same_image(ids, ids), 0.0)
    np.testing.assert_allclose(targets.numpy(), [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])


def test_single_pair_keeps_its_axes():
    image, text = tensors(features(1, 4, 8, seed=4), features(1, 8, seed=5))
    i2t, t2i = similarities(image, text, image, text, paddle.to_tensor(0.07))
    assert list(i2t.shape) == list(t2i.shape) == [1, 1]
    assert float(i2t) == pytest.approx(float((image @ text[0]).max()) / 0.07, rel=1e-5)


def test_single_query_and_single_dimension_keep_their_axes():
    image, text = tensors(features(3, 1, 1, seed=6), features(3, 1, seed=7))
    assert [list(scores.shape) for scores in similarities(image, text, image, text, paddle.to_tensor(1.0))] == [[3, 3], [3, 3]]


def test_gradient_pulls_a_pair_together():
    image, text = tensors(features(2, 1, 8, seed=8), features(2, 8, seed=9))
    image.stop_gradient = False
    ids = paddle.arange(2)
    i2t, t2i = similarities(image, text, image.detach(), text, paddle.to_tensor(0.5))
    itc_loss(i2t, t2i, contrast_targets(same_image(ids, ids), 0.0)).backward()
    towards_own = -(image.grad[:, 0] * text).sum(axis=-1)
    towards_other = -(image.grad[:, 0] * text.flip(0)).sum(axis=-1)
    assert (towards_own > towards_other).all()
