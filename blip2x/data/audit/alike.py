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


def near_groups(shape_P: np.ndarray, small_P: np.ndarray, near: int) -> np.ndarray:
    """A number per picture, int64 [P]: the same for those that chains of near duplicates connect.

    Hashes that differ in at most `near` bits are cut into `near` + 2 parts: at least two of these agree. So only pictures are
    compared that two parts have in common, and each such pair of parts is a sort.

    Args:
        shape_P: difference hashes, uint64 [P].
        small_P: small pictures, uint8 [P, bytes], which must be alike, too: plain pictures have the same hash.
        near: bits, 0 to `MOST_NEAR`.
    """
    parent = np.arange(len(shape_P))
    edges = np.linspace(0, BITS, near + _AGREEING + 1).astype(int)
    masks = [(1 << int(end)) - (1 << int(start)) for start, end in pairwise(edges)]
    bright_P = small_P.sum(1, dtype=np.int32)
    for together in combinations(masks, _AGREEING):
        part_P = shape_P & np.uint64(sum(together))
        order = np.lexsort((bright_P, shape_P, part_P))
        part, shape, places = part_P[order], shape_P[order], np.arange(len(order))
        for step in range(1, _NEIGHBOURS + 1):
            places = places[: np.searchsorted(places, len(order) - step)]
            places = places[part[places] == part[places + step]]
            if not len(places):
                break
            close = places[_bits(shape[places] ^ shape[places + step]) <= near]
            first, second = order[close], order[close + step]
            apart = np.abs(small_P[first].astype(np.int16) - small_P[second]).max(1, initial=0)
            for one, other in zip(first[apart <= _LEVELS].tolist(), second[apart <= _LEVELS].tolist(), strict=True):
                parent[_root(parent, one)] = _root(parent, other)
    while not np.array_equal(parent, above := parent[parent]):
        parent = above
    return parent


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
