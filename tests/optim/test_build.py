"""AdamW as configured: decay only where it belongs, clipping over all parameters together, nothing for frozen parts."""

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.run import OptimConfig
from blip2x.errors import UserError
from blip2x.optim.build import build_optimizer


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
