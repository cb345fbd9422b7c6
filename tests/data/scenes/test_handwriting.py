import subprocess
import sys

import numpy as np

from blip2x.data.scenes.handwriting import load_handwriting, split_sources


def test_the_digits_are_scikit_learns():
    handwriting = load_handwriting()
    assert handwriting.ink.shape == (1797, 8, 8) and handwriting.ink.dtype == np.float32
    assert handwriting.ink.min() == 0 and handwriting.ink.max() == 1
    assert np.bincount(handwriting.digits).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_scikit_learn_is_not_imported():
    code = (
        "import sys; from blip2x.data.scenes.handwriting import load_handwriting as f; f(); assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_image_is_on_both_sides_of_the_split():
    digits = load_handwriting().digits
    train, evaluation = split_sources(digits, eval_share=0.2, seed=3)
    for digit in range(10):
        assert not set(train[digit]) & set(evaluation[digit])
        assert set(train[digit]) | set(evaluation[digit]) == set(np.flatnonzero(digits == digit).tolist())
        assert abs(len(evaluation[digit]) / len(train[digit]) - 0.25) < 0.02


def test_both_sides_have_every_digit_at_extreme_shares():
    for share in (0.0001, 0.9999):
        train, evaluation = split_sources(load_handwriting().digits, eval_share=share, seed=0)
        assert all(train.values()) and all(evaluation.values())
