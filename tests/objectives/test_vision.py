"""Patch labels: losses added over heads, unlabelled patches left out."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.objectives.vision import VisionObjective


class Fixed(nn.Layer):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, image_BCHW):
        return {name: paddle.to_tensor(values.astype("float32")) for name, values in self.logits.items()}


def test_loss_and_accuracy_of_each_head():
    rng = np.random.default_rng(0)
    logits = {"digit": rng.normal(size=(2, 3, 4)), "colour": rng.normal(size=(2, 3, 2))}
    labels = {"digit": np.array([[0, 3, -100], [1, 2, 2]]), "colour": np.array([[1, 0, 0], [1, 1, 1]])}
    batch = {f"label_{name}_BP": paddle.to_tensor(values) for name, values in labels.items()}
    parts = VisionObjective(Fixed(logits))({"image_BCHW": paddle.zeros([2, 3, 8, 8]), **batch})
    total = 0.0
    for name, values in logits.items():
        known = labels[name] >= 0
        own = np.take_along_axis(values, np.maximum(labels[name], 0)[..., None], axis=-1)[..., 0]
        loss = (np.log(np.exp(values).sum(axis=-1)) - own)[known].mean()
        assert float(parts[name]) == pytest.approx(loss, abs=1e-6)
        shown = labels[name] > 0
        assert float(parts[f"{name}_accuracy"]) == pytest.approx((values.argmax(axis=-1) == labels[name])[shown].mean())
        total += loss
    assert float(parts["loss"]) == pytest.approx(total, abs=1e-6)
    assert set(parts) == {"loss", "digit", "colour", "digit_accuracy", "colour_accuracy"}


def test_empty_pictures_have_no_accuracy_to_divide_by():
    batch = {"image_BCHW": paddle.zeros([1, 3, 8, 8]), "label_digit_BP": paddle.zeros([1, 3], dtype="int64")}
    parts = VisionObjective(Fixed({"digit": np.zeros((1, 3, 4))}))(batch)
    assert float(parts["digit_accuracy"]) == 0 and float(parts["loss"]) == pytest.approx(np.log(4))
