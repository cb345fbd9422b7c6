"""The 1,797 handwritten digits (UCI's optical digits, 8 x 8 pixels) that the scikit-learn wheel carries."""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from blip2x.errors import UserError

DIGITS = tuple(range(10))
_FULL_INK = 16  # pixel values are 0 .. 16


@dataclass(frozen=True)
class Handwriting:
    """Ink of each image, [1797, 8, 8] float32 in 0..1, and the digit that each shows."""

    ink: np.ndarray
    digits: np.ndarray


def load_handwriting() -> Handwriting:
    """Read the digits.

    The file is found beside the package without importing scikit-learn, which would take two seconds.
    """
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError("the digits data set comes with scikit-learn, which is not installed; run: pip install scikit-learn")
    path = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise UserError(f"the installed scikit-learn has no {path}; reinstall scikit-learn 1.4 or newer")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    return Handwriting(ink=table[:, :-1].reshape(-1, 8, 8) / _FULL_INK, digits=table[:, -1].astype(np.int64))


def split_sources(digits: np.ndarray, *, eval_share: float, seed: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Indexes of the train and of the eval images per digit; no image is in both."""
    rng = random.Random(f"{seed}/sources")
    train, evaluation = {}, {}
    for digit in DIGITS:
        indexes = np.flatnonzero(digits == digit).tolist()
        rng.shuffle(indexes)
        count = min(max(1, round(eval_share * len(indexes))), len(indexes) - 1)
        evaluation[digit], train[digit] = indexes[:count], indexes[count:]
    return train, evaluation
