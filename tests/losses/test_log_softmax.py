"""Against NumPy in double precision: scores of any size, masked ones, and the gradient."""

import numpy as np
import paddle
import pytest

from blip2x.losses.log_softmax import log_softmax


@pytest.mark.parametrize("axis", [0, 1])
def test_values_and_gradient_are_numpys(axis):
    logits = np.random.default_rng(0).normal(size=(3, 7)) * [[1], [30], [1000]]
    logits[0, 2] = np.finfo(np.float32).min / 2  # masked
    weight = np.random.default_rng(1).normal(size=(3, 7))
    shifted = logits - logits.max(axis=axis, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))
    gradient = weight - np.exp(expected) * weight.sum(axis=axis, keepdims=True)

    given = paddle.to_tensor(logits.astype(np.float32), stop_gradient=False)
    found = log_softmax(given, axis=axis)
    (found * paddle.to_tensor(weight.astype(np.float32))).sum().backward()
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given.grad.numpy(), gradient, rtol=1e-4, atol=1e-5)


def test_a_compiled_graph_gives_the_same():
    def compiled(logits):
        return log_softmax(logits, axis=1)

    logits = paddle.to_tensor(np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32))
    expected = log_softmax(logits, axis=1).numpy()
    np.testing.assert_allclose(paddle.jit.to_static(compiled, full_graph=True)(logits).numpy(), expected, rtol=1e-5)
