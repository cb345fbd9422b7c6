"""Every pair is in a batch, and batches are large where images have few texts and where they have many."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.tasks.common.pair_batches import pair_batches


@pytest.mark.parametrize("counts", [[700, 650, 3], [1] * 100, [5, 1, 2, 2, 9, 1], [256, 257], [1], []])
def test_every_pair_is_matched_with_its_own_image_and_few_are_matched_twice(counts):
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(len(counts)) * 3, counts)
    length = rng.integers(3, 35, len(image))
    batches = pair_batches(image, length, 256)
    places = np.concatenate([batch.ravel() for batch in batches]) if batches else np.zeros(0, int)
    assert sorted(set(places.tolist())) == list(range(len(image)))
    assert len(places) <= 2 * len(image)
    for batch in batches:
        assert batch.size <= 256 and len(batch) <= 32
        assert (image[batch] == image[batch[:, :1]]).all()


def test_few_texts_per_image_make_few_batches_and_long_texts_stand_together():
    assert [batch.shape for batch in pair_batches(np.arange(64), np.full(64, 9), 256)] == [(32, 1), (32, 1)]
    assert len(pair_batches(np.repeat(np.arange(64), 4), np.full(256, 9), 256)) == 2
    length = np.array([30, 4, 5, 29])
    first, second = pair_batches(np.zeros(4, int), length, 2)
    assert sorted(map(sorted, (length[first[0]], length[second[0]]))) == [[4, 5], [29, 30]]
