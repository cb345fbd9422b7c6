"""How a cost grows with a size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of seconds = c * sizes ** p, by least squares of logarithms: 1 is linear, 2 quadratic, 0 no growth.

    Raises:
        ValueError: there are fewer than two different sizes, or one of the numbers is not positive and finite.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 2:
        raise ValueError(f"an exponent needs two sizes and as many times, got {list(sizes)} and {list(seconds)}")
    if not all(0 < number < math.inf for number in (*sizes, *seconds)):
        raise ValueError(f"an exponent is of positive numbers, got {list(sizes)} and {list(seconds)}")
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
