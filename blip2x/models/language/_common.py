"""What the adapters around PaddleNLP's modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import paddle.nn.functional as F
from paddle import Tensor, nn
from paddlenlp.transformers.model_utils import PretrainedModel, no_init_weights

P = TypeVar("P", bound=PretrainedModel)


class LayerNorm(nn.LayerNorm):
    """A norm that hands gradients through when it is frozen.

    Paddle's backward on a CPU takes the weight for 1 where the weight itself wants no gradient (3.3.1), so that whatever feeds
    a frozen language model would be trained with wrong gradients.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis."""
        weight = self.weight
        if weight.stop_gradient and not hidden.stop_gradient:
            weight = weight.detach()  # shares the memory
            weight.stop_gradient = False
        return F.layer_norm(hidden, self._normalized_shape, weight, self.bias, self._epsilon)


def build_pretrained(build: Callable[[], P]) -> P:
    """Build a PaddleNLP module with random weights, or without memory for them under ``paddle.LazyGuard``."""
    with no_init_weights(_enable=True):  # it would fill every parameter, lazy ones too
        module = build()
    if is_initialized(module):
        module.init_weights()
    return module


def replace_norms(module: nn.Layer, kind: type[nn.Layer], make: Callable[[nn.Layer], nn.Layer]) -> None:
    """Put `make(norm)` in the place of each norm of `kind` inside `module`."""
    for layer in module.sublayers():
        for name, child in list(layer.named_children()):
            if isinstance(child, kind):
                setattr(layer, name, make(child))


def is_initialized(layer: nn.Layer) -> bool:
    """Whether the parameters have memory; those built under ``paddle.LazyGuard`` have none."""
    return all(parameter._is_initialized() for parameter in layer.parameters())
