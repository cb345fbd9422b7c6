"""Hard negatives: never of the same image, in proportion to the similarity, in one draw; and the loss of the pairs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.losses.itc import same_image
from blip2x.losses.itm import draw_negatives, itm_loss


def frequencies(similarity: np.ndarray, same: np.ndarray, draws: int = 4000) -> np.ndarray:
    """Share of each column among the draws of each row, drawn all at once by repeating the rows."""
    rows, columns = similarity.shape
    index, exists = draw_negatives(
        paddle.to_tensor(np.tile(similarity, (draws, 1)).astype("float32")), paddle.to_tensor(np.tile(same, (draws, 1)))
    )
    assert list(index.shape) == list(exists.shape) == [rows * draws]
    drawn = index.numpy().reshape(draws, rows)
    return np.stack([np.bincount(drawn[:, row], minlength=columns) / draws for row in range(rows)])


def test_draws_follow_the_softmax_over_other_images():
    paddle.seed(0)
    similarity = np.array([[9.0, 1.0, 0.0, 9.0], [2.0, 9.0, 1.0, 0.0]])
    same = np.array([[True, False, False, True], [False, True, False, False]])
    weight = np.exp(similarity) * ~same
    # a share of 4,000 draws strays by 0.008 (one sigma)
    np.testing.assert_allclose(frequencies(similarity, same), weight / weight.sum(axis=1, keepdims=True), atol=0.035)


def test_other_images_are_found_beside_a_far_more_similar_one_of_the_same():
    paddle.seed(0)
    found = frequencies(np.array([[14.0, -1000.0, -1001.0]]), np.array([[True, False, False]]))
    assert found[0, 0] == 0
    assert found[0, 1] == pytest.approx(1 / (1 + np.exp(-1)), abs=0.035)


def test_same_image_with_another_caption_is_no_negative():
    paddle.seed(0)
    ids = paddle.to_tensor([5, 5, 5, 6])
    index, exists = draw_negatives(paddle.zeros([4, 4]), same_image(ids, ids))
    assert index.numpy()[:3].tolist() == [3, 3, 3] and index.numpy()[3] < 3
    assert exists.numpy().all()


@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_one_image_only_have_no_negative(size):
    ids = paddle.full([size], 8, dtype="int64")
    index, exists = draw_negatives(paddle.randn([size, size]), same_image(ids, ids))
    assert not exists.numpy().any()
    assert ((index.numpy() >= 0) & (index.numpy() < size)).all()  # it is still used to gather


def test_rows_with_and_without_negatives_mix():
    same = paddle.to_tensor([[True, True], [True, False]])
    index, exists = draw_negatives(paddle.zeros([2, 2]), same)
    assert exists.numpy().tolist() == [False, True] and int(index[1]) == 1


def test_seed_repeats_the_draw():
    same = paddle.eye(64).astype("bool")
    draws = []
    for seed in (1, 1, 2):
        paddle.seed(seed)
        draws.append(draw_negatives(paddle.zeros([64, 64]), same)[0].numpy().tolist())
    assert draws[0] == draws[1] != draws[2]


def test_loss_and_accuracy_over_the_pairs_that_count():
    logits = np.random.default_rng(0).normal(size=(6, 2))
    label = np.array([1, 1, 0, 0, 0, 0])
    counts = np.array([True, True, True, False, True, False])
    loss = (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), label])[counts].mean()
    accuracy = (logits.argmax(axis=1) == label)[counts].mean()
    ours = itm_loss(paddle.to_tensor(logits.astype("float32")), paddle.to_tensor(label), paddle.to_tensor(counts))
    assert [float(value) for value in ours] == pytest.approx([loss, accuracy], abs=1e-6)
