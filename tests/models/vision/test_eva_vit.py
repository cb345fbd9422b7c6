"""EVA's encoder: shapes, initial weights, stochastic depth, recomputation, weights of another image size."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.engine.checkpoint import save_checkpoint
from blip2x.errors import UserError
from blip2x.models import recompute
from blip2x.models.freeze import freeze, set_train_mode
from blip2x.models.vision import _blocks
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.registry import VISION_ENCODERS

TINY = {
    "image_size": 12,
    "patch_size": 4,
    "width": 24,
    "depth": 3,
    "num_heads": 3,
    "mlp_width": 40,
    "drop_path_rate": 0.0,
    "recompute": False,
}


def tiny(**changes) -> EvaVit:
    paddle.seed(0)
    return EvaVit(**{**TINY, **changes})


def images(count: int, size: int = 12) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(0).normal(size=(count, 3, size, size)).astype("float32"))


def gradients(model: nn.Layer, image: paddle.Tensor) -> dict[str, np.ndarray | None]:
    paddle.seed(1)  # the same branches are dropped
    (model(image) ** 2).sum().backward()
    return {name: None if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("count", [1, 2])
def test_features_of_every_patch_and_the_class_token(count):
    model = tiny()
    assert model(images(count)).shape == [count, 1 + 3 * 3, 24]
    assert (model.width, model.image_size, model.patch_size) == (24, 12, 4)


def test_an_image_does_not_see_the_others():
    model = tiny()
    model.eval()
    both = model(images(2))
    np.testing.assert_allclose(both[1:].numpy(), model(images(2)[1:]).numpy(), atol=1e-5)


def test_class_token_comes_first():
    model = tiny(depth=0)
    model.embeddings.class_token.set_value(np.full([1, 1, 24], 7.0, "float32"))
    model.embeddings.positions.set_value(np.zeros([1, 10, 24], "float32"))
    features = model(images(1)).numpy()
    assert (features[:, 0] == 7).all() and (features[:, 1:] != 7).all()


def test_vit_g_is_counted_without_memory():
    with paddle.LazyGuard():
        model = VISION_ENCODERS.get("eva_vit")(compose_config(["model=opt2.7b"]).model.vision)
    assert isinstance(model, EvaVit) and model.image_size == 224
    assert sum(math.prod(p.shape) for p in model.parameters()) == 985_894_528
    assert not any(p._is_initialized() for p in model.parameters())


def test_built_from_the_demos_config():
    config = compose_config(["model=tiny_opt", "model.vision.drop_path_rate=0.2", "model.vision.recompute=true"]).model.vision
    model = VISION_ENCODERS.get(config.kind)(config)
    assert len(model.blocks) == config.depth and model.blocks.recompute
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx(np.linspace(0, 0.2, config.depth))
    assert model(images(1, config.image_size)).shape == [1, 1 + (config.image_size // config.patch_size) ** 2, config.width]


@pytest.mark.parametrize(("change", "numbers"), [({"image_size": 13}, "13.*4"), ({"num_heads": 5}, "24.*5")])
def test_sizes_that_do_not_divide(change, numbers):
    with pytest.raises(UserError, match=numbers):
        tiny(**change)


def test_initial_weights_shrink_with_depth_where_they_enter_the_sum():
    model = tiny(width=96, mlp_width=192)
    for index, block in enumerate(model.blocks):
        for layer, divisor in (
            (block.attention.qkv, 1),
            (block.fc1, 1),
            (block.attention.out, math.sqrt(2 * (index + 1))),
            (block.fc2, math.sqrt(2 * (index + 1))),
        ):
            assert layer.weight.numpy().std() == pytest.approx(0.02 / divisor, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.numpy().any(), name
    assert model.embeddings.positions.numpy().std() == pytest.approx(0.02, rel=0.2)


def test_keys_have_no_bias():
    attention = tiny().blocks[0].attention
    assert attention.qkv.bias is None
    assert attention.query_bias.shape == attention.value_bias.shape == [24]


def test_keys_may_have_a_bias_which_changes_no_output():
    """So that a file's comes back whole."""
    with_bias, without = tiny(key_bias=True), tiny()
    state = with_bias.state_dict()
    generator = np.random.default_rng(0)
    for name, array in without.state_dict().items():
        array.set_value(generator.normal(size=array.shape).astype("float32"))
        if name in state:
            state[name].set_value(array)
    for ours, theirs in zip(with_bias.blocks, without.blocks, strict=True):
        assert ours.attention.qkv.bias.shape == [72] and ours.attention.query_bias is None
        keys = generator.normal(size=24).astype("float32")
        attention = theirs.attention
        ours.attention.qkv.bias.set_value(np.concatenate([attention.query_bias.numpy(), keys, attention.value_bias.numpy()]))
    # the outputs reach 245, of which float32 keeps seven digits
    np.testing.assert_allclose(with_bias(images(2)).numpy(), without(images(2)).numpy(), rtol=0, atol=3e-3)


def test_stochastic_depth_acts_in_training_only():
    model = tiny(drop_path_rate=0.5)
    image = images(1).tile([16, 1, 1, 1])
    model.eval()
    same = model(image).numpy()
    np.testing.assert_allclose(same, same[:1].repeat(16, axis=0), atol=1e-5)
    model.train()
    assert len(np.unique(model(image).numpy()[:, 0, 0].round(5))) > 2  # every sample drops branches of its own


def test_frozen_encoder_has_no_stochastic_depth():
    model = tiny(drop_path_rate=0.5)
    freeze(model)
    set_train_mode(model)
    np.testing.assert_array_equal(model(images(2)).numpy(), model(images(2)).numpy())


def test_dropped_branches_keep_the_expectation():
    paddle.seed(0)
    branch = paddle.ones([4000, 2, 3])
    dropped = _blocks.drop_path(branch, 0.25, training=True).numpy()
    assert (dropped == dropped[:, :1, :1]).all()  # a sample as a whole
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    assert dropped.mean() == pytest.approx(1, abs=0.04)  # 0.04 is more than four standard errors
    assert _blocks.drop_path(branch, 0.25, training=False) is branch


def test_rates_rise_linearly():
    assert _blocks.drop_path_rates(0.4, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert _blocks.drop_path_rates(0.4, 1) == [0]


@pytest.mark.parametrize("trained", ["all", "blocks", "last block"])
def test_recomputed_gradients_are_the_same(trained):
    wanted, found = (
        gradients(partly_frozen(trained, drop_path_rate=0.3, recompute=again), images(2)) for again in (False, True)
    )
    assert any(gradient is not None for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            np.testing.assert_array_equal(found[name], gradient, err_msg=name)


def partly_frozen(trained: str, **changes) -> EvaVit:
    model = tiny(**changes)
    if trained != "all":
        freeze(model.embeddings)
    if trained == "last block":
        freeze(model.blocks[0])
        freeze(model.blocks[1])
    set_train_mode(model)
    return model


@pytest.mark.parametrize(("case", "count"), [("all", 3), ("last block", 1), ("evaluation", 0), ("no_grad", 0), ("frozen", 0)])
def test_recomputes_only_what_is_trained(case, count, monkeypatch):
    calls = []

    def counting(block, hidden, **options):
        calls.append(options)
        return block(hidden)

    monkeypatch.setattr(recompute, "recompute", counting)
    model = partly_frozen(case if case == "last block" else "all", recompute=True)
    if case == "evaluation":
        model.eval()
    if case == "frozen":
        freeze(model)
        set_train_mode(model)
    with paddle.set_grad_enabled(case != "no_grad"):
        model(images(1))
    assert calls == [{"use_reentrant": False}] * count


def test_weights_of_another_image_size(tmp_path):
    small, large = tiny(), tiny(image_size=20)
    save_checkpoint(tmp_path / "small", small, kind="test", step=0)
    with pytest.raises(UserError, match=r"positions is \[1, 10, 24\] in the file, but \[1, 26, 24\] in the model"):
        load_checkpoint(tmp_path / "small", large, prefix="vision.")
    report = load_checkpoint(tmp_path / "small", large, prefix="vision.", adapt=large.adapters())
    assert report.adapted == {"embeddings.positions": "[1, 10, 24] to [1, 26, 24]"}
    stored, stretched = small.embeddings.positions.numpy(), large.embeddings.positions.numpy()
    assert stretched.shape == (1, 26, 24)
    np.testing.assert_array_equal(stretched[:, 0], stored[:, 0])
    assert (stretched[0, 1] != stored[0, 1]).all()  # a corner: not aligned
    assert large(images(1, 20)).shape == [1, 26, 24]


def test_a_compiled_graph_gives_equal_features():
    model, image = tiny(), images(2)
    model.eval()
    with paddle.no_grad():
        expected = model(image).numpy()
        np.testing.assert_array_equal(paddle.jit.to_static(model.forward, full_graph=True)(image).numpy(), expected)
