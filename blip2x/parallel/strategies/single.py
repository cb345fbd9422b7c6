"""One process, no process group."""

from __future__ import annotations

from blip2x.config.run import Device, ParallelismConfig
from blip2x.errors import UserError
from blip2x.parallel.context import Context
from blip2x.parallel.devices import select_device, started_processes
from blip2x.registry import STRATEGIES


@STRATEGIES.register("single")
def build(cfg: ParallelismConfig, device: Device) -> Context:
    """The context whose collectives are identities.

    Raises:
        UserError: a launcher started several processes, which would all do the same work.
    """
    if started_processes() > 1:
        raise UserError(
            f"parallelism={cfg.kind} is one process, but {started_processes()} were started; "
            "choose parallelism=dp, or start python runners/run.py without the launcher"
        )
    return Context(device=select_device(device))
