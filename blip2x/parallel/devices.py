"""Which device this process computes on."""

from __future__ import annotations

import os

import paddle

from blip2x.config.run import Device
from blip2x.errors import UserError


def select_device(device: Device) -> str:
    """Set paddle's device and give its name: "cpu" or "gpu:<index>".

    Raises:
        UserError: a GPU is asked for where there is none, or this rank's is one more than there are.
    """
    gpus = paddle.device.cuda.device_count() if paddle.is_compiled_with_cuda() else 0
    if device is Device.gpu and not gpus:
        raise UserError("device=gpu, but paddle finds no GPU; use device=cpu, or install paddlepaddle-gpu where there is one")
    if device is Device.cpu or not gpus:
        paddle.set_device("cpu")
        # ranks on CPUs talk through gloo; paddle's launcher says so itself, but only where it finds no GPU at all
        os.environ["PADDLE_DISTRI_BACKEND"] = "gloo"
        return "cpu"
    card = os.environ.get("FLAGS_selected_gpus", "0").split(",")[0]  # noqa: SIM112  # where the launcher names the card
    if int(card) >= gpus:
        raise UserError(f"this process is to use GPU {card}, but paddle finds {gpus}; start at most one process per GPU")
    paddle.set_device(f"gpu:{card}")
    return f"gpu:{card}"


def started_processes() -> int:
    """How many processes the launcher or Slurm started; 1 without either."""
    return int(os.environ.get("PADDLE_TRAINERS_NUM", "1"))


def process_rank() -> int:
    """This process's number among those; 0 without either."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("PADDLE_LOCAL_RANK", os.environ.get("PADDLE_RANK_IN_NODE", "0")))
