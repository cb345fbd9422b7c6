"""From the config group ``optim`` to an optimizer and its schedule."""

from __future__ import annotations

import paddle
from paddle import nn

from blip2x.config.run import OptimConfig
from blip2x.errors import UserError
from blip2x.optim.groups import decay_names, rate_factors, trained_parameters
from blip2x.optim.schedule import WarmupCosine


def build_optimizer(cfg: OptimConfig, layer: nn.Layer, total_steps: int) -> tuple[paddle.optimizer.AdamW, WarmupCosine]:
    """AdamW over what `layer` trains, and the schedule that sets its rate.

    A parameter's own rate, where `cfg.layer_decay` makes it another one, is the schedule's times a factor that is kept with the
    parameter; its weight decay is smaller by the same factor, since AdamW decays by rate x weight_decay.

    Raises:
        UserError: everything in `layer` is frozen, or `cfg.layer_decay` would do nothing.
    """
    parameters = trained_parameters(layer)
    if not parameters:
        raise UserError("every parameter is frozen, so there is nothing to train; set a part's frozen=false")
    schedule = WarmupCosine(
        lr=cfg.lr,
        warmup_start_lr=cfg.warmup_start_lr,
        warmup_steps=cfg.warmup_steps,
        eta_min=cfg.eta_min,
        total_steps=total_steps,
    )
    factors = rate_factors(layer, cfg.layer_decay)
    for parameter in parameters:  # of which every optimizer and sharding of paddle's takes notice
        parameter.optimize_attr = {**parameter.optimize_attr, "learning_rate": factors[parameter.name]}
    decayed = decay_names(layer)
    optimizer = paddle.optimizer.AdamW(
        learning_rate=schedule,
        parameters=parameters,  # one flat list: over several groups paddle would clip each by its own norm
        beta1=cfg.beta1,
        beta2=cfg.beta2,
        epsilon=cfg.eps,
        weight_decay=cfg.weight_decay,
        apply_decay_param_fun=lambda name: name in decayed,
        grad_clip=None if cfg.clip_grad_norm is None else nn.ClipGradByGlobalNorm(cfg.clip_grad_norm),
    )
    return optimizer, schedule
