"""AdamW as configured: decay only where it belongs, clipping over all parameters together, nothing for frozen parts."""

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.compose import compose_config
from blip2x.config.run import OptimConfig
from blip2x.errors import UserError
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.optim.build import build_optimizer
from blip2x.registry import VISION_ENCODERS


def config(**changes):
    values = {
        "lr": 0.1,
        "warmup_start_lr": 0.1,
        "warmup_steps": 0,
        "eta_min": 0.1,
        "weight_decay": 0.5,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-8,
        "clip_grad_norm": None,
        "layer_decay": 1.0,
    }
    return OptimConfig(**{**values, **changes})


def test_decay_leaves_a_layer_norm_with_zero_gradient_alone():
    """With structured names in `apply_decay_param_fun` everything decays: a bias of 1 became 0.95 in one step."""
    layer = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    layer[1].bias.set_value(paddle.ones([2]))
    before = {name: p.numpy().copy() for name, p in layer.named_parameters()}
    optimizer, _ = build_optimizer(config(), layer, total_steps=10)
    (layer(paddle.ones([1, 2])) * 0).sum().backward()
    optimizer.step()
    after = {name: p.numpy() for name, p in layer.named_parameters()}
    for name in ("0.bias", "1.weight", "1.bias"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_allclose(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5), rtol=1e-6)


def test_first_step_is_adamw_by_hand():
    layer = nn.Linear(2, 1)
    weight, bias = (p.numpy().copy() for p in layer.parameters())
    optimizer, _ = build_optimizer(config(), layer, total_steps=10)
    layer(paddle.to_tensor([[3.0, -2.0]])).sum().backward()
    optimizer.step()
    # with bias correction the first step is lr * sign(gradient), after the decay
    np.testing.assert_allclose(layer.weight.numpy(), weight * 0.95 - 0.1 * np.array([[1.0], [-1.0]]), rtol=1e-5)
    np.testing.assert_allclose(layer.bias.numpy(), bias - 0.1, rtol=1e-5)


def test_clipping_is_over_all_parameters_together():
    """Clipped group by group, the gradients below would come out as long as the bound each."""
    layer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer, _ = build_optimizer(config(clip_grad_norm=0.5), layer, total_steps=10)
    layer(paddle.randn([8, 4]) * 10).pow(2).sum().backward()
    pairs = [(p, p.grad) for p in layer.parameters()]
    clipped = [grad.numpy() for _, grad in optimizer._grad_clip(pairs)]
    np.testing.assert_allclose(np.sqrt(sum((grad**2).sum() for grad in clipped)), 0.5, rtol=1e-5)


def test_frozen_parameters_are_not_given_to_the_optimizer():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in layer[0].parameters():
        parameter.stop_gradient = True
    optimizer, _ = build_optimizer(config(), layer, total_steps=10)
    assert [p.name for p in optimizer._parameter_list] == [p.name for p in layer[1].parameters()]


def test_rate_moves_with_the_schedule():
    optimizer, schedule = build_optimizer(config(warmup_start_lr=0.0, warmup_steps=4), nn.Linear(1, 1), total_steps=8)
    assert optimizer.get_lr() == 0.0
    schedule.step()
    assert optimizer.get_lr() == pytest.approx(0.025)


def test_nothing_to_train_is_one_sentence():
    layer = nn.Linear(1, 1)
    for parameter in layer.parameters():
        parameter.stop_gradient = True
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(config(), layer, total_steps=1)


DECAY, DEPTH = 0.5, 3


def encoder(option):
    """A classifier on a small image encoder of three blocks, with every parameter at 1."""
    shape = {"image_size": 32, "patch_size": 16, "width": 8, "depth": DEPTH, "num_heads": 2, "mlp_width": 8}
    cfg = compose_config([f"model/vision={option}", *(f"model.vision.{name}={value}" for name, value in shape.items())])
    model = PatchClassifier(VISION_ENCODERS.get(cfg.model.vision.kind)(cfg.model.vision), {"digit": 2})
    for parameter in model.parameters():
        parameter.set_value(paddle.ones_like(parameter))
    return model


def expected_factor(name):
    """BEiT's numbering, written out: three blocks, and what comes before them is half as fast again."""
    if not name.startswith("vision."):
        return 1.0
    return {"vision.blocks.2": 0.5, "vision.blocks.1": 0.25, "vision.blocks.0": 0.125}.get(name[:15], 0.0625)


@pytest.mark.parametrize("option", ["eva_vit_g", "clip_vit_l"])
def test_each_block_moves_at_its_own_rate(option):
    """Every gradient is 1, so that AdamW's first step is the parameter's rate: lr * factor * (1 + decay of a weight of 1)."""
    model = encoder(option)
    optimizer, schedule = build_optimizer(config(layer_decay=DECAY, warmup_start_lr=0.01, warmup_steps=9), model, 10)
    for step, rate in enumerate([0.01, 0.02]):  # the schedule moves all of them
        before = {name: p.numpy().copy() for name, p in model.named_parameters()}
        paddle.add_n([p.sum() for p in model.parameters()]).backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        seen = set()
        for name, parameter in model.named_parameters():
            factor, decays = expected_factor(name), parameter.ndim >= 2
            seen.add(factor)
            moved = before[name] - parameter.numpy()
            np.testing.assert_allclose(
                moved, rate * factor * (1 + 0.5 * before[name] * decays), rtol=2e-4, err_msg=f"{step} {name}"
            )
        assert seen == {1.0, 0.5, 0.25, 0.125, 0.0625}


def test_clipping_is_over_all_parameters_together_with_layer_decay():
    model = encoder("eva_vit_g")
    optimizer, _ = build_optimizer(config(layer_decay=DECAY, clip_grad_norm=0.5), model, 10)
    assert len(optimizer._parameter_list) == len(model.parameters()) and optimizer._param_groups is optimizer._parameter_list
    paddle.add_n([p.sum() for p in model.parameters()]).backward()
    clipped = [grad.numpy() for _, grad in optimizer._grad_clip([(p, p.grad) for p in model.parameters()])]
    np.testing.assert_allclose(np.sqrt(sum((grad**2).sum() for grad in clipped)), 0.5, rtol=1e-5)


def test_a_later_training_of_the_same_parameters_has_its_own_rates():
    model = encoder("eva_vit_g")
    build_optimizer(config(layer_decay=DECAY), model, 10)
    optimizer, _ = build_optimizer(config(), model, 10)
    paddle.add_n([p.sum() for p in model.parameters()]).backward()
    optimizer.step()
    np.testing.assert_allclose(model.vision.embeddings.projection.bias.numpy(), 0.9, rtol=1e-5)


def test_layer_decay_without_a_trained_encoder_would_do_nothing():
    model = encoder("eva_vit_g")
    for parameter in model.vision.parameters():
        parameter.stop_gradient = True
    with pytest.raises(UserError, match=r"optim.layer_decay=0.5 .* none of its blocks is trained"):
        build_optimizer(config(layer_decay=DECAY), model, 10)
