"""Masks: hidden keys get nothing, and rows without any key stay finite."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from blip2x.models.masks import attention_bias, causal, for_all_heads


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bias_is_of_the_scores_type_and_far_from_its_end(dtype):
    bias = attention_bias(paddle.to_tensor([True, False]), getattr(paddle, dtype))
    assert str(bias.dtype) == f"paddle.{dtype}"
    shown, hidden = bias.tolist()
    assert shown == 0 and paddle.finfo(bias.dtype).min < hidden < -1e30


@pytest.mark.parametrize("score", [-1e4, 0.0, 1e4])
def test_hidden_keys_get_nothing(score):
    bias = attention_bias(paddle.to_tensor([[True, False, True]]), paddle.float32)
    share = F.softmax(paddle.to_tensor([[0.0, score, 0.0]]) + bias)
    np.testing.assert_allclose(share.numpy(), [[0.5, 0.0, 0.5]], atol=1e-20)  # paddle's softmax never goes below exp(-64)


def test_a_row_that_sees_nothing_stays_finite():
    share = F.softmax(attention_bias(paddle.zeros([1, 4], dtype="bool"), paddle.float32) - 1e4)
    np.testing.assert_allclose(share.numpy(), 0.25)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_causal(length):
    mask = causal(length)
    assert mask.shape == [1, 1, length, length]
    np.testing.assert_array_equal(mask.numpy()[0, 0], np.tril(np.ones((length, length), bool)))


@pytest.mark.parametrize("shape", [(2, 1, 1, 5), (1, 1, 3, 5), (2, 1, 3, 5)])
def test_a_bias_written_out_adds_the_same(shape):
    score, bias = paddle.randn([2, 4, 3, 5]), paddle.randn(shape)
    written = for_all_heads(bias, 4, 3)
    assert written.shape == [shape[0], 4, 3, 5]
    np.testing.assert_array_equal((score + written).numpy(), (score + bias).numpy())
