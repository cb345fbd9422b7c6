"""Attention of new tokens over keys and values that the rows of a decoding batch share.

A group is what was read once: an image with its prompt. All texts that are written about it, beams or samples, look into one
place, where their own tokens are put down behind the prefix, those of all of them; which of these a text sees is a matter of
a mask. So a prefix is there once per group, a step writes its new tokens in place, and another order of the beams is another
mask: nothing is copied.

N rows, G groups, K lanes (texts of a group at most), C slots of a group, of which S hold the prefix, H heads, W width of one
head, D = H x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from blip2x.models.masks import attention_bias, for_all_heads

KeysValues = tuple[Tensor, Tensor]  # [G, H, S, W] each

_FIRST_STEPS = 10  # for which there is room at first, enough for VQA's answers; then as many again as were written


class SharedCache:
    """Keys and values of all layers, and which of them each row sees.

    A cache goes on once: `reorder` gives one that writes into the same memory.

    Args:
        prefix: keys and values of each layer; they stay as they are. None: a layer has none yet.
        visible_GS: bool, which slots of the prefix are no padding.
        heads: of each layer.
    """

    def __init__(self, prefix: Sequence[KeysValues | None], visible_GS: np.ndarray, *, heads: int):
        self.heads = heads
        # flat, [G x H x C, W]: a slot is a row
        self.layers = [pair and tuple(tensor.reshape([-1, tensor.shape[3]]) for tensor in pair) for pair in prefix]
        self.written = 0  # new tokens of a text so far
        self._visible_GKC = visible_GS[:, None]
        self._token_GC = np.zeros(visible_GS.shape, np.int64)  # which of the new tokens stands there, in each text that sees it
        self._used = visible_GS.shape[1]  # slots; those behind them are free
        self._seat_N = np.arange(len(visible_GS))  # group x K + lane

    @property
    def seen_N(self) -> np.ndarray:
        """How many tokens each row sees."""
        groups, lanes, slots = self._visible_GKC.shape
        return self._visible_GKC.reshape(groups * lanes, slots).sum(axis=1)[self._seat_N]

    def reorder(self, index_N: np.ndarray) -> SharedCache:
        """Row n continues row index_N[n]; rows may repeat or vanish.

        Groups without rows stay in memory until half of all have none: what is copied then is less than what was freed.
        """
        groups, lanes, _ = self._visible_GKC.shape
        group_N, old_lane_N = np.divmod(self._seat_N[index_N], lanes)
        lane_N = _places(group_N)
        after = object.__new__(SharedCache)
        vars(after).update(vars(self))
        after._visible_GKC = np.zeros((groups, lane_N.max() + 1, self._visible_GKC.shape[2]), bool)
        after._visible_GKC[group_N, lane_N] = self._visible_GKC[group_N, old_lane_N]
        kept = np.unique(group_N)
        if 2 * len(kept) <= groups:
            after._keep(kept, groups)
            group_N = np.searchsorted(kept, group_N)
        after._seat_N = group_N * after._visible_GKC.shape[1] + lane_N
        return after

    def open(self) -> Look:
        """Look at what is there, without new tokens."""
        return Look(self, None)

    def append(self, *, ahead: bool = True) -> Look:
        """Make room for one new token per row, which its row sees from now on; their keys and values follow by layers.

        Where there is no room, some is made for tokens to come as well, unless `ahead` is false: for a token that is the same
        in all texts of a group, of which it is not known yet how many there will be.
        """
        lanes = self._visible_GKC.shape[1]
        if self._used + lanes > self._visible_GKC.shape[2]:
            self._grow(lanes * (max(_FIRST_STEPS, self.written) if ahead else 1))
        group_N, lane_N = np.divmod(self._seat_N, lanes)
        slot_N = self._used + lane_N
        self._visible_GKC[group_N, lane_N, slot_N] = True
        self._token_GC[:, self._used : self._used + lanes] = self.written
        self._used += lanes
        self.written += 1
        row_NH = (group_N[:, None] * self.heads + np.arange(self.heads)) * self._visible_GKC.shape[2] + slot_N[:, None]
        return Look(self, paddle.to_tensor(row_NH.reshape(-1)))

    def _keep(self, kept: np.ndarray, groups: int) -> None:
        """Only these groups, in memory of their own."""
        index = paddle.to_tensor(kept)

        def chosen(tensor: Tensor) -> Tensor:
            return paddle.index_select(tensor.reshape([groups, -1]), index, axis=0).reshape([-1, tensor.shape[1]])

        for place, pair in enumerate(self.layers):  # layer by layer, so that only one is there twice
            self.layers[place] = pair and tuple(map(chosen, pair))
        self._visible_GKC, self._token_GC = self._visible_GKC[kept], self._token_GC[kept]

    def _grow(self, room: int) -> None:
        """Room for more slots; those that no row sees any more, tokens of beams that were given up, are left out."""
        groups, _, slots = self._visible_GKC.shape
        seen_GC = self._visible_GKC.any(axis=1)
        kept = seen_GC.sum(axis=1).max(initial=0)
        slot_GA = np.tile(np.arange(slots), (groups, 1))
        if kept < slots:
            slot_GA = np.argsort(~seen_GC, axis=1, kind="stable")[:, :kept]  # those that are seen, in their order
        head_GH1 = (np.arange(groups)[:, None, None] * self.heads + np.arange(self.heads)[:, None]) * slots
        row = None if kept == slots else paddle.to_tensor((head_GH1 + slot_GA[:, None]).reshape(-1))

        def larger(tensor: Tensor) -> Tensor:
            width = tensor.shape[1]
            old = tensor if row is None else paddle.index_select(tensor, row, axis=0)
            free = paddle.zeros([groups, self.heads, room, width], tensor.dtype)
            return paddle.concat([old.reshape([groups, self.heads, kept, width]), free], axis=2).reshape([-1, width])

        for place, pair in enumerate(self.layers):
            self.layers[place] = pair and tuple(map(larger, pair))
        wider = ((0, 0), (0, room))
        self._token_GC = np.pad(np.take_along_axis(self._token_GC, slot_GA, axis=1), wider)
        self._visible_GKC = np.pad(np.take_along_axis(self._visible_GKC, slot_GA[:, None], axis=2), ((0, 0), *wider))
        self._used = kept


class Look:
    """One look of all rows into a `SharedCache`, the same in every layer.

    Attributes:
        token_GC: which of the new tokens stands in each slot.
    """

    def __init__(self, cache: SharedCache, row_NH: Tensor | None):
        self._cache, self._row_NH = cache, row_NH
        self._visible_GKC, self.token_GC = cache._visible_GKC, cache._token_GC
        groups, lanes, _ = self._visible_GKC.shape
        seats = groups * lanes
        self._seats = None
        if not np.array_equal(cache._seat_N, np.arange(seats)):  # some lanes are empty
            row_of_seat = np.zeros(seats, np.int64)
            row_of_seat[cache._seat_N] = np.arange(len(cache._seat_N))
            self._seats = paddle.to_tensor(row_of_seat), paddle.to_tensor(cache._seat_N)

    def bias(self, dtype: paddle.dtype, extra: Tensor | None = None) -> Tensor:
        """What is added to the scores, [G, H, K, C]; `extra` [G, H, 1, C] with it."""
        heads, lanes = self._cache.heads, self._visible_GKC.shape[1]
        bias = for_all_heads(attention_bias(paddle.to_tensor(self._visible_GKC).unsqueeze(1), dtype), 1, lanes)
        if extra is not None:
            return bias + extra
        return bias.expand([bias.shape[0], heads, lanes, bias.shape[3]])

    def write(self, layer: int, key_ND: Tensor, value_ND: Tensor) -> None:
        """Put the new tokens' keys and values down, in place."""
        pair = self._cache.layers[layer]
        width = key_ND.shape[1] // self._cache.heads
        if pair is None:
            rows = self._cache.heads * self._visible_GKC.shape[0] * self._visible_GKC.shape[2]
            pair = tuple(paddle.zeros([rows, width], new.dtype) for new in (key_ND, value_ND))
            self._cache.layers[layer] = pair
        for tensor, new_ND in zip(pair, (key_ND, value_ND), strict=True):
            tensor.scatter_(self._row_NH, new_ND.reshape([-1, width]))

    def read(self, layer: int, query_ND: Tensor, bias: Tensor) -> Tensor:
        """What each row gathers [N, D]; queries are scaled already."""
        groups, lanes, slots = self._visible_GKC.shape
        heads = self._cache.heads
        key, value = (tensor.reshape([groups, heads, slots, -1]) for tensor in self._cache.layers[layer])
        if self._seats is not None:
            query_ND = paddle.index_select(query_ND, self._seats[0], axis=0)
        query_GHKW = query_ND.reshape([groups, lanes, heads, -1]).transpose([0, 2, 1, 3])
        score_GHKC = paddle.matmul(query_GHKW, key, transpose_y=True) + bias
        share_GHKC = F.softmax(score_GHKC.astype("float32"), axis=-1).astype(score_GHKC.dtype)
        mixed_GHKW = paddle.matmul(share_GHKC, value)
        mixed_ND = mixed_GHKW.transpose([0, 2, 1, 3]).reshape([groups * lanes, -1])
        return mixed_ND if self._seats is None else paddle.index_select(mixed_ND, self._seats[1], axis=0)


def _places(group_N: np.ndarray) -> np.ndarray:
    """Each row's place among those of its group."""
    order = np.argsort(group_N, kind="stable")
    in_order = group_N[order]
    place_N = np.empty(len(group_N), np.int64)
    place_N[order] = np.arange(len(group_N)) - np.searchsorted(in_order, in_order)
    return place_N
