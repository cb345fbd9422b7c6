"""What blip2x/models/language/_common.py does for both adapters."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.models.language._common import is_initialized
from blip2x.models.language.opt import OptLanguageModel
from blip2x.models.language.t5 import T5LanguageModel

SIZES = {"width": 64, "num_heads": 2, "mlp_width": 64, "vocab_size": 500, "dropout": 0.0}
T5_SIZES = {"head_width": 32, "relative_buckets": 8, "relative_max_distance": 12, "exact_gelu": True}
BUILDERS = {
    "opt": lambda: OptLanguageModel(**SIZES, depth=1, max_positions=8),
    "t5": lambda: T5LanguageModel(**SIZES, **T5_SIZES, encoder_depth=1, decoder_depth=1),
}
# OPT's 0.02 is for a width of 768; T5's (width x head width) ** -0.5 for queries, width ** -0.5 and 1 for embeddings
EXPECTED_STD = {"opt": [0.02 * (768 / 64) ** 0.5], "t5": [(64 * 32) ** -0.5, 64**-0.5, 1.0]}


@pytest.mark.parametrize("kind", BUILDERS)
def test_built_lazily_nothing_has_memory(kind):
    with paddle.LazyGuard():
        model = BUILDERS[kind]()
    assert not is_initialized(model)
    assert not any(parameter._is_initialized() for parameter in model.parameters())
    assert is_initialized(BUILDERS[kind]())  # and the guard is gone


@pytest.mark.parametrize("kind", BUILDERS)
def test_fresh_weights_follow_the_seed_and_none_is_left_as_it_was_allocated(kind):
    paddle.seed(0)
    first = BUILDERS[kind]()
    paddle.seed(0)
    second = BUILDERS[kind]()
    for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy(), err_msg=name)
        assert np.abs(one.numpy()).max() < 10, name
        if one.ndim == 2 and "relative" not in name:
            assert any(abs(one.numpy().std() / std - 1) < 0.15 for std in EXPECTED_STD[kind]), name
