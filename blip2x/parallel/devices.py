"""Which device this process computes on."""

from __future__ import annotations

import os

import paddle

from blip2x.config.run import Device
from blip2x.errors import UserError


def select_device(device: Device) -> str:
    """Set paddle's device and give its name: "cpu" or "gpu:<index>".

    Raises:
        UserError: a GPU is asked for where there is none.
    """
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if device is Device.gpu and not gpus:
        raise UserError("device=gpu, but paddle finds no GPU; use device=cpu, or install paddlepaddle-gpu where there is one")
    card = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]  # noqa: SIM112  # where the launcher names the card
    name = "cpu" if device is Device.cpu or not gpus else f"gpu:{card}"
    paddle.set_device(name)
    return name


def started_processes() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("PADDLE_LOCAL_RANK", os.environ.get("PADDLE_RANK_IN_NODE", "0")))
