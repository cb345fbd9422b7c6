"""The language-modelling loss against float64 NumPy."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from blip2x.losses.lm import IGNORED, lm_loss, shift_right, target_labels

LABELS = np.array([[3, IGNORED, 0, 6], [IGNORED, IGNORED, IGNORED, 2]])


def logits(*shape: int) -> np.ndarray:
    return 5 * np.random.default_rng(0).normal(size=shape)


def reference(values: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    log = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    losses = []
    for place in zip(*np.nonzero(labels != IGNORED), strict=True):
        target = np.full(values.shape[-1], smoothing / values.shape[-1])
        target[labels[place]] += 1 - smoothing
        losses.append(-target @ log[place])
    return float(np.mean(losses))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 1), slice(1, 2)])
def test_mean_over_targets_only(rows, smoothing):
    values = logits(2, 4, 7)[rows]
    ours = lm_loss(paddle.to_tensor(values.astype("float32")), paddle.to_tensor(LABELS[rows]), smoothing)
    assert float(ours) == pytest.approx(reference(values, LABELS[rows], smoothing), abs=5e-6)


def test_paddles_own_mean_would_divide_by_all_positions():
    """Why the mean is taken by hand; should paddle change this, `lm_loss` can become one call."""
    values, labels = paddle.to_tensor(logits(2, 4, 7).astype("float32")), paddle.to_tensor(LABELS)
    theirs = F.cross_entropy(values, labels, ignore_index=IGNORED)
    assert float(theirs) == pytest.approx(float(lm_loss(values, labels)) * 4 / 8, rel=1e-5)


def test_ignored_positions_get_no_gradient():
    values = paddle.to_tensor(logits(2, 4, 7).astype("float32"), stop_gradient=False)
    lm_loss(values, paddle.to_tensor(LABELS), 0.1).backward()
    moved = np.abs(values.grad.numpy()).sum(axis=-1) > 0
    np.testing.assert_array_equal(moved, LABELS != IGNORED)


def test_no_target_is_no_loss():
    labels = paddle.full([2, 4], IGNORED, dtype="int64")
    assert float(lm_loss(paddle.to_tensor(logits(2, 4, 7).astype("float32")), labels)) == 0


def test_labels_keep_targets():
    ids, mask = paddle.to_tensor([[2, 5, 1]]), paddle.to_tensor([[0, 1, 0]])
    assert target_labels(ids, mask).numpy().tolist() == [[IGNORED, 5, IGNORED]]


def test_shifted_inputs_begin_with_the_start_token():
    ids, mask = paddle.to_tensor([[5, 6, 1], [7, 1, 0]]), paddle.to_tensor([[1, 1, 1], [1, 1, 0]])
    shifted, seen = shift_right(ids, mask, 0)
    assert shifted.numpy().tolist() == [[0, 5, 6], [0, 7, 1]]
    assert seen.numpy().tolist() == [[1, 1, 1], [1, 1, 1]]


def test_shifted_single_token_keeps_its_axes():
    shifted, seen = shift_right(paddle.to_tensor([[1]]), paddle.to_tensor([[1]]), 0)
    assert shifted.numpy().tolist() == [[0]] and seen.numpy().tolist() == [[1]]
