"""CIDEr-D against pycocoevalcap's, which takes ten and more times as long."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from blip2x.metrics.cider import cider_scores


def theirs(references: list[list[str]], predictions: list[str]) -> np.ndarray:
    true, told = dict(enumerate(references)), {image: [caption] for image, caption in enumerate(predictions)}
    return Cider().compute_score(true, told)[1]


@pytest.mark.parametrize("images", [1, 2, 3, 40])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocoevalcap_on_random_words(images, seed):
    """Few words, so that n-grams repeat within captions and between images; empty and unknown ones included."""
    draw = random.Random(seed)
    write = lambda: " ".join(draw.choices("abcde", k=draw.choice([0, 1, 2, 3, 5, 8, 20])))  # noqa: E731
    references = [["a", *(write() for _ in range(draw.randint(0, 5)))] for _ in range(images)]
    predictions = [draw.choice([write(), write(), "f g h", captions[-1]]) for captions in references]
    np.testing.assert_allclose(cider_scores(references, predictions), theirs(references, predictions), rtol=0, atol=1e-12)


def test_what_pycocoevalcap_cannot_score_is_zero():
    assert cider_scores([[""], ["", ""]], ["", "a"]).tolist() == [0, 0]


def test_5000_images_take_less_than_three_seconds(coco_val):
    captions = [[text.lower() for text in own[:5]] for own in list(coco_val.values())[:5001]]
    start = time.process_time()
    scores = cider_scores(captions[:5000], [own[0] for own in captions[1:]])
    assert time.process_time() - start < 3
    assert 0 < scores.mean() < 1  # captions of other images
