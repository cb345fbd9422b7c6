"""Frozen survives train(): paddle sets the flag of every sublayer, so modes are switched in one place."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.models.freeze import freeze, set_eval_mode, set_train_mode


@pytest.fixture
def model():
    """A trained layer around a frozen one, which has dropout deep inside."""
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5)))
    freeze(inner)
    return nn.Sequential(inner, nn.Dropout(0.5), nn.Linear(4, 4))


def test_frozen_parts_have_no_gradient(model):
    model(paddle.ones([2, 4])).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["2.weight", "2.bias"]
    assert all(p.stop_gradient for p in model[0].parameters())


def test_train_mode_reaches_all_but_the_frozen_parts(model):
    set_train_mode(model)
    assert [layer.training for layer in model[0].sublayers(include_self=True)] == [False] * 4
    assert model.training and model[1].training and model[2].training
    x = paddle.ones([8, 4])
    np.testing.assert_array_equal(model[0](x).numpy(), model[0](x).numpy())  # no dropout
    assert (model[1](x).numpy() == 0).any()


def test_paddle_s_own_train_would_not_do(model):
    model.train()
    assert model[0][1][0].training


def test_eval_mode_reaches_everything_and_a_frozen_whole_stays_in_it(model):
    set_train_mode(model)
    set_eval_mode(model)
    assert not any(layer.training for layer in model.sublayers(include_self=True))
    freeze(model)
    set_train_mode(model)
    assert not any(layer.training for layer in model.sublayers(include_self=True))
