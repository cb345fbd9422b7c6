"""How much memory this process has used at most."""

from __future__ import annotations

import resource
import sys


def peak_memory_mib() -> float:
    """Highest resident size of this process so far, in MiB (its loader workers are not counted)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # macOS counts bytes, Linux KiB
