"""A tiny Q-Former and patches for it to look at."""

from __future__ import annotations

import paddle
import pytest

from blip2x.models.qformer.qformer import QFormer

SIZES = {"num_queries": 3, "width": 12, "depth": 3, "num_heads": 2, "mlp_width": 20, "cross_attention_every": 2}
SIZES |= {"vision_width": 10, "dropout": 0.0, "vocab_size": 17, "max_positions": 8}


@pytest.fixture(scope="session")
def build():
    """`build(**changes)` -> a Q-Former with freshly drawn weights."""

    def make(**changes) -> QFormer:
        paddle.seed(0)
        return QFormer(**{**SIZES, **changes})

    return make


@pytest.fixture(scope="session")
def qformer(build, enliven):
    return enliven(build())


@pytest.fixture(scope="session")
def patches():
    paddle.seed(1)
    return paddle.randn([2, 5, 10])
