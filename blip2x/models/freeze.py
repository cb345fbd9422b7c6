"""Freezing: what it means for gradients, for dropout and for checkpoints, in one place."""

from __future__ import annotations

from paddle import nn


def freeze(layer: nn.Layer) -> None:
    """Mark `layer` as frozen: no gradient, always in evaluation mode, left out of checkpoints.

    The mark is what counts in `set_train_mode`: paddle's ``Layer.train()`` sets a flag on every sublayer and calls none of
    their ``train()``, so a layer cannot defend itself by overriding it.
    """
    layer.is_frozen = True
    for parameter in layer.parameters():
        parameter.stop_gradient = True
    layer.eval()


def set_train_mode(layer: nn.Layer) -> None:
    """Training mode for `layer`, except for the parts inside it that are frozen."""
    layer.train()
    for sublayer in layer.sublayers(include_self=True):
        if getattr(sublayer, "is_frozen", False):
            sublayer.eval()


def set_eval_mode(layer: nn.Layer) -> None:
    """Evaluation mode for all of `layer`."""
    layer.eval()
