"""Which parameters are trained, which of them decay, and which of them learn more slowly."""

from __future__ import annotations

import re

from paddle import Tensor, nn

from blip2x.errors import UserError

_ENCODER = re.compile(r"(?:^|\.)vision\.(?:blocks\.(\d+)\.)?")


def trained_parameters(layer: nn.Layer) -> list[Tensor]:
    """The parameters that the optimizer gets: all that are not frozen, shared ones once."""
    return [p for p in layer.parameters() if not p.stop_gradient]


def decay_names(layer: nn.Layer) -> set[str]:
    """Names of the trained parameters that get weight decay: those with two axes or more.

    Biases, the weights of LayerNorm and RMSNorm, and scalars such as the temperature have fewer. Query tokens, class tokens and
    embeddings have more and decay, as in LAVIS, whose main branch tells by the same rule except that the temperature, which has
    no axis, decays there. The names are the parameters' own (`linear_12.w_0`), which is what `apply_decay_param_fun` is asked
    about, and not those of the state dict.
    """
    return {p.name for p in trained_parameters(layer) if p.ndim >= 2}


def rate_factors(layer: nn.Layer, layer_decay: float) -> dict[str, float]:
    """By the own names of the trained parameters, what the learning rate is multiplied by.

    Layer-wise decay as in BEiT (arXiv 2106.08254) and, in intent, LAVIS: in an image encoder of `depth` blocks, what comes
    before the blocks is layer 0 and block i is layer i + 1; a layer has `layer_decay` ** (depth + 1 - layer), so that the last
    block has `layer_decay`. All else that is trained has 1.

    Raises:
        UserError: there is a decay, but no block of an image encoder is trained.
    """
    places = {name: _ENCODER.search(name) for name, _ in layer.named_parameters()}
    depth = max((int(place[1]) + 1 for place in places.values() if place and place[1]), default=0)
    factors, in_blocks = {}, 0
    for name, parameter in layer.named_parameters():
        if parameter.stop_gradient:
            continue
        place = places[name]
        number = int(place[1]) + 1 if place and place[1] else 0
        in_blocks += number > 0
        factors[parameter.name] = layer_decay ** (depth + 1 - number) if place else 1.0
    if layer_decay != 1 and not in_blocks:
        raise UserError(
            f"optim.layer_decay={layer_decay} is for a trained image encoder, but none of its blocks is trained here; "
            "set model.vision.frozen=false or optim.layer_decay=1"
        )
    return factors


def rate_groups(layer: nn.Layer, layer_decay: float) -> dict[str, float]:
    """Of what `layer` trains at a rate of its own, by name, what the learning rate is multiplied by; empty without a decay.

    "vision_first" and "vision_last" are the first and last trained layer of the image encoder; each one between them has
    `layer_decay` times the rate of the next.
    """
    own = rate_factors(layer, layer_decay)
    factors = sorted({own[p.name] for name, p in layer.named_parameters() if p.name in own and _ENCODER.search(name)})
    return {"vision_first": factors[0], "vision_last": factors[-1]} if factors and layer_decay != 1 else {}
