"""A classifier of patches on top of an image encoder."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.models.assemblies.patch_classifier import PatchClassifier


@pytest.mark.parametrize("rows", [1, 2])
def test_each_patch_is_classified_and_the_class_token_is_not(vision, enliven, image, rows):
    model = enliven(PatchClassifier(vision(), {"digit": 11, "colour": 4}))
    logits = model(image[:rows])
    assert {name: values.shape for name, values in logits.items()} == {"digit": [rows, 9, 11], "colour": [rows, 9, 4]}
    features = model.norm(model.vision(image[:rows]))
    np.testing.assert_allclose(logits["colour"].numpy(), model.heads["colour"](features)[:, 1:].numpy(), atol=1e-6)


def test_encoder_s_parameters_stand_below_vision(vision):
    names = {name.split(".")[0] for name, _ in PatchClassifier(vision(), {"digit": 11}).named_parameters()}
    assert names == {"vision", "norm", "heads"}
    assert paddle.isfinite(PatchClassifier(vision(), {"digit": 2})(paddle.zeros([1, 3, 12, 12]))["digit"]).all()
