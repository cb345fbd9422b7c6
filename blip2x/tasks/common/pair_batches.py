"""Pairs of images and texts in batches for matching, so that none is small where images have few texts each.

K pairs, G images of a batch, T texts of each.
"""

from __future__ import annotations

import numpy as np

_IMAGES = 32  # of a batch: their patches, 4 MB each at 364 pixels and full size, are stacked


def pair_batches(image_K: np.ndarray, length_K: np.ndarray, size: int) -> list[np.ndarray]:
    """Places among the pairs, [G, T] per batch, each row those of one image: at most `size` in all, or one image's texts.

    An image with more than `size` texts is divided evenly, short texts apart from long ones, since a batch is as wide as its
    longest text. Rows with fewer pairs than others of their batch repeat their last one.

    Args:
        image_K: a number of each pair's image.
        length_K: tokens of each pair's text.
        size: pairs of a batch.
    """
    if not len(image_K):
        return []
    order_K = np.lexsort((length_K, image_K))
    starts = np.flatnonzero(np.diff(image_K[order_K], prepend=-1))
    rows = [row for own in np.split(order_K, starts[1:]) for row in np.array_split(own, -(-len(own) // size))]
    rows.sort(key=len)
    batches: list[list[np.ndarray]] = []
    for row in rows:  # rising, so that this one is the longest so far
        last = batches[-1] if batches else []
        if last and len(last) < _IMAGES and (len(last) + 1) * len(row) <= size and len(row) <= 2 * len(last[0]):
            last.append(row)
        else:
            batches.append([row])
    return [np.stack([np.pad(row, (0, len(own[-1]) - len(row)), "edge") for row in own]) for own in batches]
