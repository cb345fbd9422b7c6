"""Frozen survives train(): paddle sets the flag of every sublayer, so modes are switched in one place."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.base import core

from blip2x.config.compose import compose_config
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze, set_eval_mode, set_train_mode
from blip2x.objectives.stage2 import Stage2Objective


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


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_t5"])
@pytest.mark.parametrize("recompute", ["false", "true"])
def test_frozen_towers_get_no_gradient_buffers(name, recompute):
    """Gradients flow through the language model, and leave nothing behind but those of what is trained."""
    switches = [f"model.{part}.recompute={recompute}" for part in ("vision", "qformer", "language")]
    model = build_stage2(compose_config([f"model={name}", *switches]).model, vocab_size=20)
    freeze(model.vision)
    freeze(model.language)
    objective = Stage2Objective(model)
    set_train_mode(objective)
    ids_BL = paddle.to_tensor([[3, 4, 5], [6, 7, 8]])
    ones_BL = paddle.ones_like(ids_BL)
    batch = {"image_BCHW": paddle.ones([2, 3, 48, 48])}
    batch |= dict.fromkeys(["text_ids_BL", "input_ids_BL", "output_ids_BT"], ids_BL)
    batch |= dict.fromkeys(["text_mask_BL", "label_mask_BL", "input_mask_BL", "output_mask_BT"], ones_BL)

    before = core.host_memory_stat_current_value("Allocated", 0)
    objective(batch)["loss"].backward()
    held = core.host_memory_stat_current_value("Allocated", 0) - before
    trained = {name for name, parameter in model.named_parameters() if not name.startswith(("vision.", "language."))}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert held == sum(p.grad.size * p.grad.element_size() for p in model.parameters() if p.grad is not None)
