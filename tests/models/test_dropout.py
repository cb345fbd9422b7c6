"""Dropout on a CPU: Paddle's law, numbers that follow from Paddle's generator, and gradients through the same places."""

import numpy as np
import paddle
import pytest

from blip2x.models.dropout import dropout

SHAPE = (40, 5, 251)


def values(seed: int = 0, *, trained: bool = True) -> paddle.Tensor:
    return paddle.to_tensor(np.random.default_rng(seed).uniform(1, 2, SHAPE).astype("float32"), stop_gradient=not trained)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_share_is_dropped_and_the_rest_enlarged(rate):
    paddle.seed(1)
    hidden = values()
    found = dropout(hidden, rate, training=True).numpy()
    kept = found != 0
    np.testing.assert_allclose(found[kept], hidden.numpy()[kept] / (1 - rate), rtol=2e-5)
    sigma = (rate * (1 - rate) / found.size) ** 0.5
    assert abs(1 - kept.mean() - rate) < 4 * sigma
    neighbours = np.corrcoef(kept.ravel()[1:], kept.ravel()[:-1])[0, 1]  # of one word of random bits
    assert abs(neighbours) < 4 / found.size**0.5


def test_gradients_go_through_what_was_kept():
    paddle.seed(2)
    hidden, grad = values(), values(3, trained=False)
    out = dropout(hidden, 0.1, training=True)
    (found,) = paddle.grad(out, [hidden], grad)
    np.testing.assert_allclose(found.numpy(), grad.numpy() * out.numpy() / hidden.numpy(), rtol=1e-5)


def test_paddles_state_says_what_is_drawn():
    paddle.seed(3)
    hidden, before = values(), paddle.get_rng_state()
    first, second = (dropout(hidden, 0.1, training=True).numpy() for _ in range(2))
    assert (first != second).any()
    paddle.set_rng_state(before)
    np.testing.assert_array_equal(dropout(hidden, 0.1, training=True).numpy(), first)
    paddle.seed(3)
    np.testing.assert_array_equal(dropout(hidden, 0.1, training=True).numpy(), first)


def test_nothing_is_drawn_where_nothing_is_dropped():
    before, hidden = paddle.get_rng_state()[0].current_seed(), values()
    assert dropout(hidden, 0.1, training=False) is hidden
    assert dropout(hidden, 0.0, training=True) is hidden
    assert paddle.get_rng_state()[0].current_seed() == before


def test_half_precision_stays():
    out = dropout(values().astype("bfloat16"), 0.1, training=True)
    assert out.dtype == paddle.bfloat16 and float((out == 0).astype("float32").mean()) == pytest.approx(0.1, abs=0.01)
    out.astype("float32").sum().backward()


def test_a_compiled_graph_drops_as_paddle_does():
    def drop(hidden):
        return dropout(hidden, 0.1, training=True)

    found = paddle.jit.to_static(drop, full_graph=True)(values(trained=False)).numpy()
    assert (found == 0).mean() == pytest.approx(0.1, abs=0.01)
