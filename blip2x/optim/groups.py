"""Which parameters are trained, and which of them decay."""

from __future__ import annotations

from paddle import Tensor, nn


def trained_parameters(layer: nn.Layer) -> list[Tensor]:
    """The parameters that the optimizer gets: all that are not frozen, shared ones once."""
    return [p for p in layer.parameters() if not p.stop_gradient]


def decay_names(layer: nn.Layer) -> set[str]:
    """Names of the trained parameters that get weight decay: those with two axes or more.

    Biases, the weights of LayerNorm and RMSNorm, and scalars such as the temperature have fewer. The names are the
    parameters' own (`linear_12.w_0`), which is what `apply_decay_param_fun` is asked about, and not those of the state dict.
    """
    return {p.name for p in trained_parameters(layer) if p.ndim >= 2}
