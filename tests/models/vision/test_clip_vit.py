"""CLIP's encoder, where it differs from EVA's."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from blip2x.config.compose import compose_config
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.models.vision.clip_vit import ClipVit, quick_gelu
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.registry import VISION_ENCODERS


def tiny(**changes) -> ClipVit:
    paddle.seed(0)
    sizes = {"image_size": 12, "patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "mlp_width": 40}
    return ClipVit(**{**sizes, "drop_path_rate": 0.0, "recompute": False, **changes})


@pytest.mark.parametrize("count", [1, 2])
def test_features_of_every_patch_and_the_class_token(count):
    model = tiny()
    assert model(paddle.ones([count, 3, 12, 12])).shape == [count, 1 + 3 * 3, 24]
    assert (model.width, model.image_size, model.patch_size) == (24, 12, 4)


def test_vit_l_is_counted_without_memory():
    with paddle.LazyGuard():
        model = VISION_ENCODERS.get("clip_vit")(compose_config(["model=opt2.7b_vitl"]).model.vision)
    width, depth, mlp, tokens = 1024, 23, 4096, 257
    block = 4 * width + 4 * (width * width + width) + (width * mlp + mlp) + (mlp * width + width)
    expected = 3 * 14 * 14 * width + width + tokens * width + 2 * width + depth * block
    assert isinstance(model, ClipVit) and expected == 290_581_504
    assert sum(math.prod(p.shape) for p in model.parameters()) == expected
    assert not any(p._is_initialized() for p in model.parameters())


def test_parameters_that_eva_has_not_and_the_reverse():
    names = {name for name, _ in tiny().named_parameters()}
    assert {"norm.weight", "norm.bias", "blocks.0.attention.qkv.bias"} <= names
    assert not {"embeddings.projection.bias", "blocks.0.attention.query_bias", "blocks.0.attention.value_bias"} & names


def test_quick_gelu_is_not_gelu():
    x = paddle.to_tensor([-2.0, 0.0, 1.5])
    np.testing.assert_allclose(quick_gelu(x).numpy(), x.numpy() / (1 + np.exp(-1.702 * x.numpy())), atol=1e-6)
    assert (quick_gelu(x) - F.gelu(x)).abs().max() > 0.01


def test_initial_weights():
    model = tiny(width=96, mlp_width=192, depth=4)
    for layer, std in (
        (model.blocks[1].attention.qkv, 96**-0.5),
        (model.blocks[1].attention.out, (2 * 4 * 96) ** -0.5),
        (model.blocks[1].fc1, (2 * 96) ** -0.5),
        (model.blocks[1].fc2, (2 * 4 * 96) ** -0.5),
    ):
        assert layer.weight.numpy().std() == pytest.approx(std, rel=0.05)
    assert not model.blocks[0].attention.qkv.bias.numpy().any()


def test_recomputed_gradients_are_the_same():
    found = []
    for recompute in (False, True):
        model = tiny(recompute=recompute, drop_path_rate=0.3)
        model.train()
        paddle.seed(1)
        (model(paddle.ones([2, 3, 12, 12])) ** 2).sum().backward()
        found.append([p.grad.numpy() for p in model.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        np.testing.assert_array_equal(recomputed, plain)


def test_weights_of_another_image_size_keep_the_corners(tmp_path):
    small, large = tiny(), tiny(image_size=20)
    save_checkpoint(tmp_path / "small", small, kind="test", step=0)
    load_checkpoint(tmp_path / "small", large, prefix="vision.", adapt=large.adapters())
    stored, stretched = small.embeddings.positions.numpy()[0], large.embeddings.positions.numpy()[0]
    for before, after in ((0, 0), (1, 1), (3, 5), (7, 21), (9, 25)):  # the class token and four corners
        np.testing.assert_allclose(stretched[after], stored[before], atol=1e-6)
