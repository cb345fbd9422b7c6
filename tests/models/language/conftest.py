"""Tiny models with lively random weights, in evaluation mode."""

from __future__ import annotations

import paddle
import pytest

from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel


def enliven(model):
    """Fresh weights make all logits nearly alike, biases and norms do nothing."""
    paddle.seed(0)
    for parameter in model.parameters():
        parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
    model.eval()
    return model


@pytest.fixture(scope="session")
def opt():
    sizes = {"width": 12, "depth": 2, "num_heads": 2, "mlp_width": 16, "vocab_size": 11, "max_positions": 10}
    return enliven(OptLanguageModel(**sizes, dropout=0.5))


@pytest.fixture(scope="session")
def t5():
    sizes = {"width": 10, "encoder_depth": 2, "decoder_depth": 2, "num_heads": 2, "head_width": 6, "mlp_width": 14}
    return enliven(
        T5LanguageModel(**sizes, vocab_size=11, relative_buckets=8, relative_max_distance=12, exact_gelu=True, dropout=0.5)
    )
