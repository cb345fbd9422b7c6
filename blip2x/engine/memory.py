"""How much memory this process has used at most, and how much is free."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import paddle

from blip2x.engine.resident import peak_mib

_jobs = 0  # that this process has begun; those of a sweep with the launcher `basic` share one
_CLEAR, _CLEAR_PEAK = Path("/proc/self/clear_refs"), "5"  # see proc(5)
_highest_mib = _highest_gpu = 0.0  # MiB and bytes, of this job before the newest `begin_part`


def peak_memory_mib() -> float:
    """Highest resident size of this process so far, in MiB (its loader workers are not counted)."""
    return max(_highest_mib, peak_mib())


def begin_peak(device: str) -> None:
    """Have `peak_memory_gb` count from here, where a job begins, which need not be this process's first."""
    global _jobs, _highest_gpu
    _jobs += 1
    _highest_gpu = 0.0
    if _is_gpu(device):
        paddle.device.cuda.reset_max_memory_allocated()


def peak_memory_gb(device: str) -> float | None:
    """What this job has used at most so far, in GB of 2**30 bytes: of a GPU's memory what tensors took, else resident.

    None: another job was in this process before, and no system tells what of its highest resident size is whose.
    """
    if _is_gpu(device):
        return max(_highest_gpu, paddle.device.cuda.max_memory_allocated()) / 2**30
    return None if _jobs > 1 else peak_memory_mib() / 2**10


def begin_part(device: str) -> bool:
    """Have `part_peak_gb` count from here; false: this system keeps the highest since the process began, and no other."""
    global _highest_mib, _highest_gpu
    if _is_gpu(device):
        _highest_gpu = max(_highest_gpu, paddle.device.cuda.max_memory_allocated())
        paddle.device.cuda.reset_max_memory_allocated()
        return True
    before = peak_mib()
    try:
        _CLEAR.write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:  # not Linux, or not allowed
        return False
    _highest_mib = max(_highest_mib, before)
    return True


def part_peak_gb(device: str) -> float:
    """What was used at most since `begin_part`, in the unit of `peak_memory_gb`."""
    return paddle.device.cuda.max_memory_allocated() / 2**30 if _is_gpu(device) else peak_mib() / 2**10


def _is_gpu(device: str) -> bool:
    return device.startswith("gpu") and paddle.is_compiled_with_cuda()


def free_memory(device: str) -> tuple[int, str]:
    """Bytes that are free on `device` now, for whoever asks first, and what to call it."""
    if device.startswith("gpu"):
        free, _ = paddle.cuda.mem_get_info(int(device.partition(":")[2] or 0))  # the driver's, so other processes count, too
        return free, f"on {device}"
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 2**10
    except (OSError, StopIteration):  # not Linux: what there is in all
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limited = free_of_limits(Path("/"))
    return (free, "on this machine") if limited is None or limited > free else (limited, "within this container's limit")


def free_of_limits(root: Path) -> int | None:
    """Bytes that the control groups of this process, of version 1 or 2, leave it; None: they set no limit, or there are none.

    `root` is the folder that holds ``proc`` and ``sys``. Pages of files that nobody has used lately count as free.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    mounted, found = root / "sys/fs/cgroup", []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version2 = not controllers
        top = mounted if version2 else mounted / "memory"
        names = ("memory.max", "memory.current", "inactive_file")
        if not version2:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):  # limits of those above hold, too; in a container it may be the top alone
            found.append(_free_of_group(top / folder, *names))
    return min((free for free in found if free is not None), default=None)


def _free_of_group(folder: Path, limit: str, used: str, idle: str) -> int | None:
    try:
        allowed = (folder / limit).read_text(encoding="ascii").strip()
        if allowed == "max":
            return None
        counts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(allowed) - int((folder / used).read_text(encoding="ascii")) + int(counts.get(idle, 0))
    except (OSError, ValueError):
        return None
