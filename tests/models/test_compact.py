"""Matrices in fewer bytes: what is rounded is the weights alone, and little; shares of them too; nothing else changes."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from blip2x.config.task import WeightsType
from blip2x.errors import UserError
from blip2x.models import compact
from blip2x.models.compact import compact_of, embedding, linear_of, linear_of_words, quantise
from blip2x.models.precision import store_compact
from blip2x.models.tensor_parallel import keep_share
from blip2x.models.weights.checkpoint import fill
from blip2x.models.weights.stored import StoredTensor
from blip2x.parallel.context import TensorGroup

STEP = {"bfloat16": 2**-8, "int8": 0.5 / 127}  # the most that a number moves: of itself, or of its output's largest


class Reader(nn.Layer):
    """A linear layer, word embeddings, and what stays as it is."""

    def __init__(self):
        super().__init__()
        self.word_embeddings, self.positions = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.up, self.norm = nn.Linear(6, 10), nn.LayerNorm(10)


def stored(array: np.ndarray) -> StoredTensor:
    return StoredTensor("x", array.shape, array.dtype, lambda: array)


def kept(dtype: str, *, transposed: bool = False) -> tuple[Reader, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    with paddle.LazyGuard():
        layer = Reader()
    arrays = {name: rng.standard_normal(p.shape).astype("float32") for name, p in layer.named_parameters()}
    arrays["up.weight"][:, 3] = 0  # an output without any input has no scale
    store_compact(layer, WeightsType(dtype), "float32")
    given = {name: np.asfortranarray(array) if transposed else array for name, array in arrays.items()}
    fill(layer, {name: stored(array) for name, array in given.items()}, "x")
    return layer, arrays


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_products_and_words_are_those_of_weights_rounded_a_little(dtype, transposed, monkeypatch):
    monkeypatch.setattr(compact, "_AT_ONCE", 20)  # several pieces, the last one smaller
    layer, arrays = kept(dtype, transposed=transposed)
    assert {name for name, p in layer.named_parameters() if compact_of(p)} == {"word_embeddings.weight", "up.weight"}
    assert str(layer.up.weight.dtype) == f"paddle.{dtype}" and str(layer.positions.weight.dtype) == "paddle.float32"
    up = linear_of(paddle.eye(6), layer.up.weight).numpy()
    assert (np.abs(up - arrays["up.weight"]) <= STEP[dtype] * np.abs(arrays["up.weight"]).max(axis=0) + 1e-7).all()
    hidden = np.random.default_rng(1).standard_normal((2, 3, 6)).astype("float32")
    np.testing.assert_allclose(
        layer.up(paddle.to_tensor(hidden)).numpy(), hidden @ up + arrays["up.bias"], rtol=1e-5, atol=1e-5
    )
    words = embedding(paddle.arange(11), layer.word_embeddings.weight).numpy()
    most = np.abs(arrays["word_embeddings.weight"]).max(axis=1, keepdims=True)
    assert (np.abs(words - arrays["word_embeddings.weight"]) <= STEP[dtype] * most + 1e-7).all()
    logits = linear_of_words(paddle.to_tensor(hidden), layer.word_embeddings.weight).numpy()
    np.testing.assert_allclose(logits, hidden @ words.T, rtol=1e-5, atol=1e-5)


def test_the_largest_number_of_an_output_stays_as_it_is():
    array = np.array([[0.0, -3.0, 1.5], [1e-30, 0, 0], [0, 0, 0]], np.float32)
    numbers, scale = quantise(array)
    assert numbers.tolist() == [[0, -127, 64], [127, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(numbers * scale[:, None], array, atol=3 / 127 / 2)


@pytest.mark.parametrize(("axis", "blocks"), [(0, 1), (1, 1), (1, 2)])
def test_a_rank_keeps_its_share(axis, blocks):
    array = np.random.default_rng(0).standard_normal((6, 8)).astype("float32")
    parts = []
    for rank in range(2):
        with paddle.LazyGuard():
            layer = nn.LayerDict({"up": nn.Linear(6, 8, bias_attr=False)})
        keep_share(layer["up"], "weight", axis, TensorGroup(rank, 2), blocks=blocks)
        store_compact(layer, WeightsType.int8, "float32")
        fill(layer, {"up.weight": stored(array)}, "x")
        parts.append(linear_of(paddle.eye(layer["up"].weight.shape[0]), layer["up"].weight).numpy())
    if blocks == 2:
        parts = [np.concatenate([part[:, i : i + 2] for part in parts], axis=1) for i in (0, 2)]
    np.testing.assert_allclose(np.concatenate(parts, axis=axis), array, atol=np.abs(array).max() * STEP["int8"])


@pytest.mark.parametrize("largest", [1e-3, 1.0])
def test_sums_of_half_precision_stay_within_its_range(largest, monkeypatch):
    """float16, in which a CPU does not multiply: operands and result are rounded to it, as autocast and a GPU's kernel do."""
    given = paddle.matmul

    def half(tensor: paddle.Tensor) -> paddle.Tensor:
        return tensor.astype("float16").astype("float32")

    monkeypatch.setattr(paddle, "matmul", lambda x, y, **named: half(given(half(x), half(y), **named)))
    monkeypatch.setattr(paddle, "is_autocast_enabled", lambda: True)
    array = np.full((11, 512), largest, np.float32)
    with paddle.LazyGuard():
        layer = nn.LayerDict({"up": nn.Linear(512, 11, bias_attr=False), "word_embeddings": nn.Embedding(11, 512)})
    store_compact(layer, WeightsType.int8, "float32")
    fill(layer, {"up.weight": stored(array.T), "word_embeddings.weight": stored(array)}, "x")
    hidden = paddle.full([1, 512], 2.0)  # times 127, 512 times, is twice as much as float16 holds
    expected = np.full((1, 11), 1024 * largest)
    np.testing.assert_allclose(linear_of(hidden, layer["up"].weight).numpy(), expected, rtol=2e-3)
    np.testing.assert_allclose(linear_of_words(hidden, layer["word_embeddings"].weight).numpy(), expected, rtol=2e-3)


def test_broken_numbers_are_named():
    with paddle.LazyGuard():
        layer = nn.LayerDict({"up": nn.Linear(2, 2, bias_attr=False)})
    store_compact(layer, WeightsType.int8, "float32")
    with pytest.raises(UserError, match="numbers that are no weights"):
        fill(layer, {"up.weight": stored(np.array([[1, np.nan], [0, 1]], np.float32))}, "x")


def test_two_bytes_stay_as_they_are():
    with paddle.LazyGuard():
        layer = nn.LayerDict({"up": nn.Linear(2, 2)})
    store_compact(layer, WeightsType.bfloat16, "float16")
    assert type(layer["up"]) is nn.Linear and compact_of(layer["up"].weight) is None
