"""EVA's and CLIP's encoders against Hugging Face transformers 4.57.6: weights and images in, features out.

make_reference.py computed in float64. Features reach 7 and image gradients 5; float32 keeps seven digits of each, and three
blocks of sums make that 2e-6 for PyTorch, and up to 3e-6 for us. Other threads and other CPUs sum in another order.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle import nn

from blip2x.models.vision._positions import interpolate_positions
from blip2x.models.vision.clip_vit import ClipVit
from blip2x.models.vision.eva_vit import EvaVit

REFERENCE = np.load(Path(__file__).parent / "reference.npz")
ENCODERS = {"eva": EvaVit, "clip": ClipVit}
ATOL = 1e-5
FELT = 1e-3  # what a real difference does to the features, at least


def encoder(name: str) -> nn.Layer:
    model = ENCODERS[name](
        image_size=20, patch_size=5, width=24, depth=3, num_heads=3, mlp_width=40, drop_path_rate=0.1, recompute=False
    )
    weights = {key.removeprefix(f"{name}."): REFERENCE[key] for key in REFERENCE.files if key.startswith(f"{name}.")}
    targets = dict(model.named_parameters())
    assert weights.keys() == targets.keys()
    for key, parameter in targets.items():
        assert weights[key].shape == tuple(parameter.shape), key
        parameter.set_value(weights[key])
    model.eval()
    return model


def difference(name: str, model: nn.Layer) -> float:
    features = model(paddle.to_tensor(REFERENCE["image"])).numpy()
    return float(np.abs(features - REFERENCE[f"{name}_features"]).max())


@pytest.mark.parametrize("name", ENCODERS)
def test_features_and_image_gradients(name):
    image = paddle.to_tensor(REFERENCE["image"], stop_gradient=False)
    features = encoder(name)(image)
    np.testing.assert_allclose(features.numpy(), REFERENCE[f"{name}_features"], rtol=0, atol=ATOL)
    (features * paddle.to_tensor(REFERENCE["probe"])).sum().backward()
    np.testing.assert_allclose(image.grad.numpy(), REFERENCE[f"{name}_image_gradient"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_counts(name):
    for key, parameter in encoder(name).named_parameters():
        model = encoder(name)
        changed = dict(model.named_parameters())[key]
        changed.set_value(changed * 1.1)
        if key.endswith("attention.qkv.bias"):
            changed.set_value(parameter * paddle.to_tensor([1.1, 1.0, 1.1]).repeat_interleave(24))  # softmax sees no key's bias
        assert difference(name, model) > FELT, key


@pytest.mark.parametrize("name", ENCODERS)
def test_other_activations_and_epsilons_are_told_apart(name):
    for activation in (lambda x: F.gelu(x, approximate=True), F.gelu if name == "clip" else lambda x: x * F.sigmoid(1.702 * x)):
        model = encoder(name)
        for block in model.blocks:
            block.activation = activation
        assert difference(name, model) > FELT
    model = encoder(name)
    for layer in model.sublayers():
        if isinstance(layer, nn.LayerNorm):
            layer._epsilon = 1e-5 if name == "eva" else 1e-6
    assert difference(name, model) > FELT


@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize("aligned", [False, True])
def test_interpolated_positions(side, aligned):
    ours = interpolate_positions(REFERENCE["positions"], (1, 1 + side**2, 6), align_corners=aligned)
    np.testing.assert_allclose(ours, REFERENCE[f"positions_{side}_{aligned}"], rtol=0, atol=ATOL)
    other = REFERENCE[f"positions_{side}_{not aligned}"]
    assert np.abs(ours - other).max() > 0.1
