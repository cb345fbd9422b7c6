"""Linear layers with the bias inside the product, and its gradient as one, against paddle's own."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from blip2x.models.linear import Linear, add_bias, linear, use_linear


def drawn(*shape: int, seed: int, trained: bool = True) -> paddle.Tensor:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return paddle.to_tensor(values, stop_gradient=not trained)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5)])
def test_values_and_gradients_are_paddles_to_rounding(shape):
    hidden, weight, bias = drawn(*shape, seed=0), drawn(5, 4, seed=1), drawn(4, seed=2)
    out, expected = linear(hidden, weight, bias), F.linear(hidden, weight, bias)
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    grad = drawn(*out.shape, seed=3, trained=False)
    found = paddle.grad(out, [hidden, weight, bias], grad)
    for ours, theirs in zip(found, paddle.grad(expected, [hidden, weight, bias], grad), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_a_bias_is_trained_behind_inputs_that_are_not():
    layer, inputs = Linear(5, 4), drawn(6, 5, seed=0, trained=False)
    layer(inputs).sum().backward()
    np.testing.assert_array_equal(layer.bias.grad.numpy(), 6)
    np.testing.assert_allclose(layer.weight.grad.numpy(), np.repeat(inputs.numpy().sum(0)[:, None], 4, 1), rtol=1e-5)


def test_a_bias_is_trained_where_nothing_before_it_is():
    hidden, weight, bias = drawn(6, 5, seed=0, trained=False), drawn(5, 4, seed=1, trained=False), drawn(4, seed=2)
    (linear(hidden, weight, bias).sum() + add_bias(hidden[:, :4], bias).sum()).backward()
    np.testing.assert_array_equal(bias.grad.numpy(), 12)


def test_a_frozen_bias_lets_the_gradient_through_and_keeps_none():
    hidden, bias = drawn(3, 4, seed=0), drawn(4, seed=1, trained=False)
    add_bias(hidden, bias).sum().backward()
    np.testing.assert_array_equal(hidden.grad.numpy(), 1)
    assert bias.grad is None


def test_a_layer_without_bias():
    layer = Linear(5, 4, bias_attr=False)
    inputs = drawn(2, 5, seed=0)
    np.testing.assert_array_equal(layer(inputs).numpy(), paddle.matmul(inputs, layer.weight).numpy())


def test_gradients_add_up_over_calls_of_one_layer():
    layer = Linear(5, 4)
    (layer(drawn(3, 5, seed=0)).sum() + layer(drawn(2, 5, seed=1)).sum()).backward()
    np.testing.assert_array_equal(layer.bias.grad.numpy(), 5)


@pytest.mark.parametrize("frozen", [{"inputs"}, {"weight"}, {"bias"}, {"inputs", "weight"}, {"weight", "bias"}])
def test_only_what_is_trained_gets_a_gradient(frozen):
    shapes = {"inputs": (2, 3, 5), "weight": (5, 4), "bias": (4,)}
    ours, theirs = (
        {name: drawn(*shape, seed=seed, trained=name not in frozen) for seed, (name, shape) in enumerate(shapes.items())}
        for _ in range(2)
    )
    (linear(*ours.values()) ** 2).sum().backward()
    (F.linear(*theirs.values()) ** 2).sum().backward()
    for name in shapes:
        if name in frozen:
            assert ours[name].grad is None
        else:
            np.testing.assert_allclose(ours[name].grad.numpy(), theirs[name].grad.numpy(), rtol=1e-4, atol=1e-5)


def test_a_librarys_layers_keep_their_parameters():
    whole = paddle.nn.Sequential(paddle.nn.Linear(5, 4), paddle.nn.ReLU(), paddle.nn.Linear(4, 3, bias_attr=False))
    before = {name: id(parameter) for name, parameter in whole.named_parameters()}
    inputs = drawn(6, 5, seed=0, trained=False)
    expected = whole(inputs).numpy()
    use_linear(whole)
    assert {type(layer) for layer in (whole[0], whole[2])} == {Linear}
    assert {name: id(parameter) for name, parameter in whole.named_parameters()} == before
    np.testing.assert_allclose(whole(inputs).numpy(), expected, rtol=1e-5, atol=1e-6)
