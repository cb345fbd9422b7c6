"""One seed for the three generators that a run draws from."""

from __future__ import annotations

import random

import numpy as np
import paddle


def seed_everything(seed: int, rank: int) -> None:
    """Seed python, numpy and paddle with `seed + rank`.

    Build models under rank 0's seed on every rank (frozen random parts are never broadcast, so they must come out equal),
    then seed again with the own rank, so that dropout differs between ranks.
    """
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    paddle.seed(seed + rank)
