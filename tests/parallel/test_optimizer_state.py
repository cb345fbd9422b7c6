"""What AdamW remembers goes out and back in under names of our own."""

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.parallel.optimizer_state import read_state, write_state


def steps(layer, optimizer, count, first=0):
    for number in range(first, first + count):
        (layer(paddle.full([2, 3], 1.0 + number)) ** 2).mean().backward()
        optimizer.step()
        optimizer.clear_grad()


def build():
    paddle.seed(0)
    layer = nn.Linear(3, 2)
    return layer, paddle.optimizer.AdamW(learning_rate=0.1, parameters=layer.parameters())


def test_another_optimizer_goes_on_bit_for_bit():
    """Its parameters have other names of paddle's."""
    layer, optimizer = build()
    steps(layer, optimizer, 3)
    state = read_state(optimizer, dict(layer.named_parameters()))
    weights = {name: value.numpy() for name, value in layer.state_dict().items()}
    steps(layer, optimizer, 3, first=3)

    other, its_optimizer = build()
    assert other.weight.name != layer.weight.name
    other.set_state_dict(weights)
    write_state(its_optimizer, dict(other.named_parameters()), state)
    steps(other, its_optimizer, 3, first=3)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name].numpy(), value.numpy())


def test_names_shapes_and_copies():
    layer, optimizer = build()
    parameters = dict(layer.named_parameters())
    assert read_state(optimizer, parameters) == {}  # no step yet
    write_state(optimizer, parameters, {})
    assert read_state(optimizer, parameters) == {}
    steps(layer, optimizer, 1)
    state = read_state(optimizer, parameters)
    kinds = ("moment1", "moment2", "beta1_power", "beta2_power")
    assert state.keys() == {f"{name}.{kind}" for name in ("weight", "bias") for kind in kinds}
    assert state["weight.moment1"].shape == (3, 2)
    before = state["weight.moment1"].copy()
    steps(layer, optimizer, 1)
    np.testing.assert_array_equal(state["weight.moment1"], before)


def test_a_part_of_a_state_is_refused():
    layer, optimizer = build()
    with pytest.raises(ValueError, match="of weight is incomplete: only moment1"):
        write_state(optimizer, dict(layer.named_parameters()), {"weight.moment1": np.zeros([3, 2], "float32")})
