"""A decoder small enough to search exhaustively: what comes next depends on everything written so far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
import pytest

STATES = 97


class ToyState(NamedTuple):
    history_N: paddle.Tensor


class ToyDecoder:
    """Logits by a table of `STATES` rows; a text's tokens are mixed into the number of its row."""

    def __init__(self, vocabulary: int, seed: int, scale: float = 2.0):
        self.table = (scale * np.random.default_rng(seed).standard_normal((STATES, vocabulary))).astype(np.float32)
        self.logits_SV = paddle.to_tensor(self.table)
        self.rows_read = 0

    def prefill(self, prefix_B):
        return self.logits_SV[prefix_B], ToyState(prefix_B)

    def step(self, token_N, state):
        self.rows_read += token_N.shape[0]
        history_N = (state.history_N * 31 + token_N + 1) % STATES
        return self.logits_SV[history_N], ToyState(history_N)

    def reorder(self, state, index_N):
        return ToyState(paddle.index_select(state.history_N, paddle.to_tensor(index_N)))

    def log_probabilities(self, first: int, tokens: tuple[int, ...]) -> np.ndarray:
        """Of the token after `tokens`, for a text that starts from prefix `first`."""
        history = first
        for token in tokens:
            history = (history * 31 + token + 1) % STATES
        logits = self.table[history].astype(np.float64)
        return logits - np.log(np.exp(logits).sum())


@pytest.fixture
def toy():
    return ToyDecoder
