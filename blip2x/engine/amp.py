"""Mixed precision of a run: what is refused, what is cast, how the loss is scaled, and which types came out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import paddle
from paddle import nn

from blip2x.config.run import HybridConfig, PrecisionConfig, PrecisionName, RunConfig
from blip2x.errors import UserError
from blip2x.models.precision import LOW, autocast_to, without_autocast

SMALLEST_SCALE, LARGEST_SCALE = 1.0, 2.0**24


def check_precision(cfg: RunConfig, device: str) -> None:
    """Raise `UserError` where `device` ("cpu", "gpu:0") or the layout of ranks cannot do what `cfg.precision` says."""
    name = cfg.precision.name
    if name is PrecisionName.fp32:
        return
    _require_gpu(name, device)
    if name is PrecisionName.bf16 and not paddle.amp.is_bfloat16_supported(device):
        raise UserError(
            f"precision=bf16, but {device} has no bfloat16 arithmetic (NVIDIA has it from compute capability 8.0 on); "
            "use precision=fp16, or precision=fp32"
        )
    if name is not PrecisionName.fp16:
        return
    if not paddle.amp.is_float16_supported(device):
        raise UserError(f"precision=fp16, but {device} has no float16 arithmetic; use precision=fp32")
    if _reads_t5(cfg) and not paddle.amp.is_bfloat16_supported(device):
        raise UserError(
            f"precision=fp16 computes T5 in bfloat16, since it overflows float16, and {device} has no bfloat16 arithmetic "
            "(NVIDIA has it from compute capability 8.0 on); use precision=fp32, or an OPT model"
        )
    if isinstance(cfg.parallelism, HybridConfig) and cfg.parallelism.sharding_stage == 3:
        raise UserError(
            "precision=fp16 with parallelism.sharding_stage=3: the loss scale cannot be divided out of gradients that are cut "
            "into slices; use precision=bf16, or parallelism=sharding2"
        )


def autocast(cfg: PrecisionConfig, device: str) -> AbstractContextManager[None]:
    """The context for forward passes on `device`; on fp32 nothing changes in it.

    Raises:
        UserError: a low precision on a CPU, where Paddle would silently compute in float32.
    """
    if cfg.name is PrecisionName.fp32:
        return nullcontext()
    _require_gpu(cfg.name, device)
    return autocast_to(LOW[cfg.name])


def full_precision() -> AbstractContextManager[None]:
    """Leaves `autocast`, for backward passes and steps of the optimizer."""
    return without_autocast()


class LossScale:
    """What the loss is multiplied by, so that small gradients are not 0 in float16; the gradients are divided by it again.

    It is halved where a gradient overflows, and doubled after `loss_scale_steps` steps in a row without. Paddle's own
    GradScaler switches itself off on a CPU, so that a run there would never show how it works.
    """

    def __init__(self, cfg: PrecisionConfig):
        self._on = cfg.name is PrecisionName.fp16
        self._grows_after = cfg.loss_scale_steps
        self._value = cfg.loss_scale if self._on else 1.0
        self._good_steps = 0

    @property
    def is_on(self) -> bool:
        """Whether precision is fp16."""
        return self._on

    @property
    def value(self) -> float:
        """1 unless precision is fp16."""
        return self._value

    def update(self, finite: bool) -> None:
        """Say after a step whether its gradients were finite. What is not so at the smallest scale, 1, no scale can mend."""
        if not self._on:
            return
        self._good_steps = self._good_steps + 1 if finite else 0
        if not finite:
            self._value = max(self._value / 2, SMALLEST_SCALE)
        elif self._good_steps == self._grows_after:
            self._value = min(self._value * 2, LARGEST_SCALE)
            self._good_steps = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, in JSON's types."""
        return {"value": self._value, "good_steps": self._good_steps}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; a scale is not taken over by another precision's run."""
        if self._on:
            self._value, self._good_steps = float(state["value"]), int(state["good_steps"])


def dtype_map(model: nn.Layer) -> dict[str, str]:
    """Name -> number type of the parameters; a part whose types are all alike is one entry, and numbers of layers are "*"."""
    types = {}
    for name, parameter in model.named_parameters():
        pattern = ".".join("*" if word.isdecimal() else word for word in name.split("."))
        types.setdefault(pattern, set()).add(str(parameter.dtype).removeprefix("paddle."))
    found: dict[str, str] = {}
    for part in _first_words(types):
        _collapse(part, types, found)
    return found


def _collapse(prefix: str, types: dict[str, set[str]], found: dict[str, str]) -> None:
    inside = {name.removeprefix(f"{prefix}."): kinds for name, kinds in types.items() if name.startswith(f"{prefix}.")}
    kinds = set().union(*inside.values(), types.get(prefix, set()))
    if len(kinds) == 1 or not inside:
        found[prefix] = " and ".join(sorted(kinds))
        return
    for word in _first_words(inside):
        _collapse(f"{prefix}.{word}", types, found)


def _first_words(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def _require_gpu(name: PrecisionName, device: str) -> None:
    if device == "cpu":
        raise UserError(
            f"precision={name.value} needs a GPU: paddle's CPU build has no {LOW[name]} arithmetic; use precision=fp32, or "
            "device=gpu where there is one"
        )


def _reads_t5(cfg: RunConfig) -> bool:
    without = ("pretrain_vision", "pretrain_stage1", "retrieval", "extract_features")
    return cfg.model.language.kind == "t5" and cfg.task.kind not in without
