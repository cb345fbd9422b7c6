"""Tiny image encoder, Q-Former and language model."""

from __future__ import annotations

import paddle
import pytest
from paddle import nn

from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.vision.eva_vit import EvaVit


@pytest.fixture(scope="session")
def vision():
    def make() -> EvaVit:
        sizes = {"image_size": 12, "patch_size": 4, "width": 10, "depth": 1, "num_heads": 2, "mlp_width": 14}
        return EvaVit(**sizes, drop_path_rate=0.0, recompute=False)

    return make


@pytest.fixture(scope="session")
def qformer():
    def make(*, vocab_size: int | None) -> QFormer:
        sizes = {"num_queries": 3, "width": 12, "depth": 2, "num_heads": 2, "mlp_width": 20, "cross_attention_every": 2}
        return QFormer(**sizes, vision_width=10, dropout=0.0, vocab_size=vocab_size, max_positions=8)

    return make


@pytest.fixture(scope="session")
def language():
    def make(kind: str) -> nn.Layer:
        if kind == "opt":
            sizes = {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 18, "vocab_size": 11, "max_positions": 12}
            return OptLanguageModel(**sizes, dropout=0.0)
        sizes = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "head_width": 6, "mlp_width": 14}
        sizes |= {"vocab_size": 11, "relative_buckets": 8, "relative_max_distance": 12}
        return T5LanguageModel(**sizes, exact_gelu=True, dropout=0.0)

    return make


@pytest.fixture
def image():
    paddle.seed(1)
    return paddle.randn([2, 3, 12, 12])
