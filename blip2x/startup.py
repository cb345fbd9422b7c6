"""Settings of the process that must stand before paddle is imported; worth a factor of four and more on AMD CPUs."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from pathlib import Path

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def prepare_process(threads: int | None = None) -> None:
    """Set threads, MKL dispatch and malloc for this process; call it before anything imports paddle.

    Args:
        threads: CPU threads of this rank's kernels; None: the cores this process may use, shared among the node's ranks.
    Raises:
        RuntimeError: paddle is imported already, so the settings would do nothing.
    """
    if "paddle" in sys.modules:
        raise RuntimeError("prepare_process() must run before paddle is imported")
    ranks = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))
    count = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ["MKL_NUM_THREADS"] = str(count)
    if _is_amd_with_avx2():
        # paddle ships an MKL that takes its slowest path on AMD processors unless it is told the instruction set
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    _keep_freed_memory()
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in ("paddle", "pkg_resources", "jieba", "google"):
        warnings.filterwarnings("ignore", module=module)  # third-party deprecation noise; our own warnings stay
    warnings.filterwarnings("ignore", message=".*ccache.*")


def _is_amd_with_avx2() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: nothing to set
        return False
    return "AuthenticAMD" in text and " avx2 " in text


def _keep_freed_memory() -> None:
    """Stop glibc from handing big blocks back to the kernel after each operation (page faults cost more than the maths)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 256 << 20)
    except (OSError, AttributeError):  # musl, macOS: no mallopt, only slower
        return
