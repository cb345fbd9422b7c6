"""Rows that share a prefix attend as rows that have it each for themselves, and nothing is copied for that."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.models.cached_attention import SharedCache

GROUPS, HEADS, PREFIX, WIDTH = 3, 2, 4, 5
VISIBLE = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], bool)  # padded on the left


class Plain:
    """Each row has a list of the keys and values that it sees, in NumPy."""

    def __init__(self, key, value):
        self.rows = [
            (list(key[g].swapaxes(0, 1)[VISIBLE[g]]), list(value[g].swapaxes(0, 1)[VISIBLE[g]])) for g in range(GROUPS)
        ]

    def reorder(self, index_N):
        self.rows = [tuple(map(list, self.rows[row])) for row in index_N]

    def step(self, query_ND, key_ND, value_ND):
        out = []
        for (keys, values), query, key, value in zip(self.rows, query_ND, key_ND, value_ND, strict=True):
            keys.append(key.reshape(HEADS, WIDTH))
            values.append(value.reshape(HEADS, WIDTH))
            score_SH = np.einsum("shw,hw->sh", np.array(keys), query.reshape(HEADS, WIDTH))
            share_SH = np.exp(score_SH) / np.exp(score_SH).sum(axis=0)
            out.append(np.einsum("sh,shw->hw", share_SH, np.array(values)).reshape(-1))
        return np.array(out)


@pytest.fixture
def draw():
    """`draw(*shape)`: other numbers at each call."""
    generator = np.random.default_rng(0)
    return lambda *shape: generator.standard_normal(shape).astype("float32")


@pytest.fixture
def both(draw):
    key, value = draw(GROUPS, HEADS, PREFIX, WIDTH), draw(GROUPS, HEADS, PREFIX, WIDTH)
    return SharedCache([(paddle.to_tensor(key), paddle.to_tensor(value))], VISIBLE, heads=HEADS), Plain(key, value)


def write(cache: SharedCache, query_ND: np.ndarray, key_ND: np.ndarray, value_ND: np.ndarray) -> np.ndarray:
    look = cache.append()
    look.write(0, paddle.to_tensor(key_ND), paddle.to_tensor(value_ND))
    return look.read(0, paddle.to_tensor(query_ND), look.bias(paddle.float32)).numpy()


ORDERS = {
    "beams of all images, then one image is done, then another": [
        [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 2, 4, 3, 4, 8, 8, 8], [3, 3, 3, 8, 6, 7], None, [5, 4, 3], *[[0, 0, 2]] * 9,
    ],
    "samples that end one by one": [[0, 0, 1, 1, 2, 2], [0, 2, 3, 4, 5], [1, 2, 4], None, [0, 2], *[None] * 9, [1]],
    "one text each, for longer than there is room at first": [None] * 20,
    "rows of an image that stand apart": [[2, 0, 1, 0, 2], [4, 3, 2, 1, 0], None],
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_each_row_sees_its_own_tokens_behind_the_prefix(both, draw, order):
    cache, plain = both
    for index_N in ORDERS[order]:
        if index_N is not None:
            cache = cache.reorder(np.array(index_N))
            plain.reorder(index_N)
        numbers = [draw(len(plain.rows), HEADS * WIDTH) for _ in range(3)]
        np.testing.assert_allclose(write(cache, *numbers), plain.step(*numbers), atol=1e-5)
        assert cache.seen_N.tolist() == [len(keys) for keys, _ in plain.rows]


def test_reordering_and_writing_copy_nothing(both, draw):
    cache, _ = both
    cache = cache.reorder(np.array([0, 0, 1, 1, 2, 2]))
    numbers = [draw(6, HEADS * WIDTH) for _ in range(3)]
    write(cache, *numbers)
    before = cache.layers[0]
    places = [tensor.data_ptr() for tensor in before]
    cache = cache.reorder(np.array([1, 1, 2, 2, 4, 5]))
    write(cache, *numbers)
    cache = cache.reorder(np.array([2, 3, 4, 5]))  # one of three images is done
    write(cache, *[array[:4] for array in numbers])
    assert all(old is new for old, new in zip(before, cache.layers[0], strict=True))
    assert [tensor.data_ptr() for tensor in cache.layers[0]] == places
    rows = before[0].shape[0]
    cache = cache.reorder(np.array([2, 3]))  # two of three: now their memory is freed
    assert cache.layers[0][0].shape[0] == rows // 3


def test_the_prefix_that_was_given_stays_as_it_was(draw):
    """A server writes several texts behind the same one."""
    key = paddle.to_tensor(draw(GROUPS, HEADS, PREFIX, WIDTH))
    before = key.numpy()
    cache = SharedCache([(key, key)], VISIBLE, heads=HEADS)
    for _ in range(3):
        write(cache, *(draw(GROUPS, HEADS * WIDTH) for _ in range(3)))
    np.testing.assert_array_equal(key.numpy(), before)


def test_tokens_that_no_beam_goes_on_from_are_left_out_when_more_room_is_made(both, draw):
    cache, _ = both
    cache = cache.reorder(np.repeat(np.arange(GROUPS), 4))
    all_from_the_first = np.repeat(4 * np.arange(GROUPS), 4)
    for _ in range(40):
        write(cache, *(draw(4 * GROUPS, HEADS * WIDTH) for _ in range(3)))
        cache = cache.reorder(all_from_the_first)
    slots = cache.layers[0][0].shape[0] // (GROUPS * HEADS)
    assert slots == PREFIX + 20 + 4 * 20  # when room was made last: one text, and four lanes for as many tokens again


def test_the_room_that_is_made_first_is_for_ten_tokens_of_all_beams(both, draw):
    """A first token of which it is not known yet how many beams go on from it takes no room from them."""
    cache, _ = both

    def append(rows: int, **options) -> int:
        look = cache.append(**options)
        look.write(0, *(paddle.to_tensor(draw(rows, HEADS * WIDTH)) for _ in range(2)))
        return cache.layers[0][0].shape[0] // (GROUPS * HEADS)

    assert append(GROUPS, ahead=False) == PREFIX + 1
    cache = cache.reorder(np.repeat(np.arange(GROUPS), 5))
    assert [append(5 * GROUPS) for _ in range(10)] == [PREFIX + 1 + 5 * 10] * 10
