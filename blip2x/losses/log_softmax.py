"""Logarithms of a softmax, at a cost that grows with the number of classes and not with its square."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
from paddle import Tensor


def log_softmax(logits: Tensor, axis: int) -> Tensor:
    """Log-probabilities along `axis`, of the shape of `logits`.

    Paddle's own kernel for CPUs sums the classes up again for each class: in the contrast, for each pair of the step.
    """
    if paddle.in_dynamic_mode() and logits.place.is_cpu_place():  # a graph that is being compiled has no places
        below = logits - logits.detach().max(axis=axis, keepdim=True)
        return below - below.exp().sum(axis=axis, keepdim=True).log()  # paddle.logsumexp takes three times as long
    return F.log_softmax(logits, axis=axis)
