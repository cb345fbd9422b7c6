"""Fresh weights make all outputs nearly alike, and biases and norms do nothing: tests need livelier ones."""

from __future__ import annotations

import paddle
import pytest
from paddle import nn


@pytest.fixture(scope="session")
def enliven():
    """`enliven(model)` -> the same model with random weights of some size, in evaluation mode."""

    def change(model: nn.Layer) -> nn.Layer:
        paddle.seed(0)
        for parameter in model.parameters():
            parameter.set_value(parameter + 0.3 * paddle.randn(parameter.shape))
        model.eval()
        return model

    return change
