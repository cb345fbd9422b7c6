"""Near duplicates among millions of pictures, without comparing each with each.

P pictures.
"""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np

BITS = 64
MOST_NEAR = 8  # bits; with more of them the parts in which two hashes must agree become so short that most do
_AGREEING = 2  # of the parts into which a hash is cut
_LEVELS = 12  # by which two small pictures may differ anywhere
_NEIGHBOURS = 1000  # of those whose parts agree, so many are compared with each, the most similar ones first
_COMPARISONS = 10_000_000  # of those whose parts agree; where they are more than 10,000, each has fewer neighbours for it
_IN_ALL = 1_000_000_000  # comparisons, which take minutes; those of the most similar ones come first


def near_groups(shape_P: np.ndarray, small_P: np.ndarray, near: int) -> np.ndarray:
    """A number per picture, int64 [P]: the same for those that chains of near duplicates connect.

    Hashes that differ in at most `near` bits are cut into `near` + 2 parts: at least two of these agree. So only pictures are
    compared that two parts have in common, and each such pair of parts is a sort. What plain pictures cost, of which very many
    may have one hash, is bounded: see `_COMPARISONS`, `_IN_ALL` and `_stand_ins`.

    Args:
        shape_P: difference hashes, uint64 [P].
        small_P: small pictures, RGB, uint8 [P, bytes], bytes a multiple of 24; they must be alike, too: plain pictures have the
            same hash.
        near: bits, 0 to `MOST_NEAR`.
    """
    parent = _stand_ins(shape_P, small_P)
    compared = np.flatnonzero(parent == np.arange(len(parent)))
    sizes = np.ones(len(parent), dtype=np.int32)
    edges = np.linspace(0, BITS, near + _AGREEING + 1).astype(int)
    masks = [(1 << int(end)) - (1 << int(start)) for start, end in pairwise(edges)]
    shape_C, colour_C = shape_P[compared], _colour_order(small_P)[compared]
    ways = list(combinations(masks, _AGREEING))
    for together in ways:
        part_C = shape_C & np.uint64(sum(together))
        in_order = np.lexsort((colour_C, shape_C, part_C))
        part, shape, order = part_C[in_order], shape_C[in_order], compared[in_order]
        count = _run_lengths(part)
        neighbours = np.repeat(np.clip(_COMPARISONS // np.maximum(count, 1), 1, _NEIGHBOURS).astype(np.int16), count)
        places, left = np.arange(len(order)), _IN_ALL // len(ways)
        for step in range(1, _NEIGHBOURS + 1):
            places = places[: np.searchsorted(places, len(order) - step)]
            places = places[(part[places] == part[places + step]) & (neighbours[places] >= step)]
            left -= len(places)
            if not len(places) or left < 0:
                break
            close = places[_bits(shape[places] ^ shape[places + step]) <= near]
            first, second = order[close], order[close + step]
            apart = _roots(parent, first) != _roots(parent, second)  # what is connected already need not be looked at
            first, second = first[apart], second[apart]
            alike = np.abs(small_P[first].astype(np.int16) - small_P[second]).max(1, initial=0) <= _LEVELS
            for one, other in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
                _connect(parent, sizes, one, other)
    return _roots(parent, parent)


def _stand_ins(shape_P: np.ndarray, small_P: np.ndarray) -> np.ndarray:
    """For each picture the place of one that is compared in its stead, mostly its own, int64 [P].

    Pictures with the same hash and the same small picture are one. Where more than `_NEIGHBOURS` have a hash, levels are cut
    into ranges of which any two levels are alike, and those with all levels in the same ranges are one, too.
    """
    stand_in = np.arange(len(shape_P))
    order = np.argsort(shape_P, kind="stable")
    count = _run_lengths(shape_P[order])
    count_O = np.repeat(count, count)
    order, count_O = order[count_O > 1], count_O[count_O > 1]
    if not len(order):
        return stand_in
    small = small_P[order]
    small[count_O > _NEIGHBOURS] //= _LEVELS + 1
    words = np.column_stack([shape_P[order], np.ascontiguousarray(small).view(np.uint64)])
    by_words = np.lexsort(words.T)
    words, order = words[by_words], order[by_words]
    starts = np.flatnonzero(np.concatenate([[True], (words[1:] != words[:-1]).any(1)]))
    stand_in[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
    return stand_in


def _colour_order(small_P: np.ndarray) -> np.ndarray:
    """Numbers that are close where mean colours are, uint32 [P]: bits of red, green and blue by turns, highest first."""
    spread = sum(((np.arange(256, dtype=np.uint32) >> bit) & 1) << (3 * bit) for bit in range(8))
    mean_PC = small_P.reshape(len(small_P), small_P.shape[1] // 3, 3).mean(1, dtype=np.float32).astype(np.uint8)
    return (spread[mean_PC] << np.arange(3, dtype=np.uint32)).sum(1, dtype=np.uint32)


def _run_lengths(values: np.ndarray) -> np.ndarray:
    """How often each value stands there, of values in order."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else np.zeros(0, dtype=np.int64)
    return np.diff(np.append(starts, len(values)))


def _roots(parent: np.ndarray, places: np.ndarray) -> np.ndarray:
    while not np.array_equal(places, above := parent[places]):
        places = above
    return places


def _connect(parent: np.ndarray, sizes: np.ndarray, one: int, other: int) -> None:
    """Make two groups one: the smaller goes below the larger, so that no way to a root is long."""
    one, other = _root(parent, one), _root(parent, other)
    if one != other:
        smaller, larger = sorted((one, other), key=sizes.__getitem__)
        parent[smaller] = larger
        sizes[larger] += sizes[smaller]


def _root(parent: np.ndarray, place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = int(parent[place])
    return place


def _bits(number: np.ndarray) -> np.ndarray:
    """How many bits are set in each."""
    number = number - ((number >> np.uint64(1)) & np.uint64(0x5555555555555555))
    number = (number & np.uint64(0x3333333333333333)) + ((number >> np.uint64(2)) & np.uint64(0x3333333333333333))
    number = (number + (number >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (number * np.uint64(0x0101010101010101)) >> np.uint64(56)
