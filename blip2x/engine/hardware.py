"""On what a run was made."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Any

import paddle

from blip2x.parallel.context import Context


def hardware(context: Context) -> dict[str, Any]:
    """The first rank's machine: processor, memory, GPUs, system, host, and how many ranks and threads share them."""
    return {
        "host": socket.gethostname(),
        "system": _system(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpus(),
        "cuda": paddle.version.cuda() if paddle.is_compiled_with_cuda() else None,
        "device": context.device,
        "ranks": context.world_size,
        "threads": int(os.environ.get("MKL_NUM_THREADS", "0")) or None,  # of each rank; null: the libraries decide
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next(filter(None, names), platform.processor() or platform.machine())


def _gpus() -> list[str]:
    if not paddle.is_compiled_with_cuda():
        return []
    return [paddle.device.cuda.get_device_name(index) for index in range(paddle.device.cuda.device_count())]


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.platform()
