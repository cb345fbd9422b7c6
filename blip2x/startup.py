"""Settings of the process that must stand before paddle is imported; worth a factor of four and more on AMD CPUs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from pathlib import Path

from blip2x.errors import UserError

# glibc's mallopt parameters (malloc.h)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_prepared_threads: list[int | None] = []  # what the first call was asked for


def prepare_process(threads: int | None = None) -> None:
    """Set threads, MKL dispatch and malloc for this process; call it before anything imports paddle. Later calls do nothing.

    Args:
        threads: CPU threads of this rank's kernels; None: the cores this process may use, shared among the node's ranks.

    Raises:
        RuntimeError: paddle is imported already, so the settings would do nothing.
        UserError: an earlier call set another number of threads.
    """
    if _prepared_threads:  # the next job of a sweep, in the same process
        if threads != _prepared_threads[0]:
            raise UserError(
                f"threads={threads}, but this process has threads={_prepared_threads[0]} since its first job; use two commands"
            )
        return
    if "paddle" in sys.modules:
        raise RuntimeError("prepare_process() must run before paddle is imported")
    _prepared_threads.append(threads)
    ranks = int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))
    count = threads or max(1, len(os.sched_getaffinity(0)) // ranks)
    for library in ("OMP", "MKL", "OPENBLAS"):  # paddle's loops, its matrix products, numpy's
        os.environ[f"{library}_NUM_THREADS"] = str(count)
    if _start_openmp():
        # its number is fixed by now; were it still here, every import of paddle would print that it is not 1
        os.environ["OMP_NUM_THREADS"] = "1"
    if _is_amd_with_avx2():
        # paddle ships an MKL that takes its slowest path on AMD processors unless it is told the instruction set
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    if _is_cpu_build():
        # Else a transposed tensor is a view, which the next operation copies element by element: attention takes twice as long
        os.environ.setdefault("FLAGS_use_stride_kernel", "0")
    _keep_freed_memory()
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in ("pkg_resources", "jieba", "google"):
        warnings.filterwarnings("ignore", module=module)  # third-party deprecation noise; our own warnings stay
    # shown, or errors, under Python's option -W only; other warnings of these may be about how we use them
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="paddle|optuna")  # paddlenlp, too
    for message in ("Setuptools is replacing distutils", "No ccache found"):  # told by the import of paddle and paddlenlp
        warnings.filterwarnings("ignore", message=message)


def prepare_process_once() -> None:
    """As `prepare_process`, for programs of others: where paddle is imported already, it stays as it is, only slower."""
    if "paddle" not in sys.modules and not _prepared_threads:
        prepare_process()


def kernel_threads() -> int:
    """CPU threads of this rank's kernels, as `prepare_process` has set them; 1 without it."""
    return int(os.environ.get("MKL_NUM_THREADS", "1"))  # OMP's number may be there for another purpose, see above


def _start_openmp() -> bool:
    """Have paddle's OpenMP read OMP_NUM_THREADS now and not at its first use; false where this build of paddle has none."""
    spec = importlib.util.find_spec("paddle")  # finds, imports nothing
    for folder in (spec and spec.submodule_search_locations) or ():
        try:
            return ctypes.CDLL(str(Path(folder, "libs", "libiomp5.so"))).omp_get_max_threads() > 0
        except (OSError, AttributeError):
            continue
    return False


def _is_cpu_build() -> bool:
    try:
        return bool(importlib.metadata.version("paddlepaddle"))
    except importlib.metadata.PackageNotFoundError:  # paddlepaddle-gpu is a package of its own
        return False


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
