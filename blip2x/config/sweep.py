"""Sweeps (``-m``): several jobs, one after the other in one process, that must not get into each other's way."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from blip2x.config.compose import command_overrides
from blip2x.errors import UserError

_names: set[str] = set()


def in_sweep() -> bool:
    """Whether this job is one of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def job_name() -> str:
    """What tells this job from the others: its number and its words."""
    return f"#{HydraConfig.get().job.num} {' '.join(command_overrides())}"


def job_command(command: list[str]) -> list[str]:
    """The words that repeat this job alone; `command` started the program."""
    return [command[0], *command_overrides()] if in_sweep() else command


def claim_run_name(name: str | None) -> None:
    """Raise `UserError` where an earlier job of this sweep has the name, whose folder `overwrite` would replace."""
    if name is None or not in_sweep():
        return
    if name in _names:
        raise UserError(
            f"run_name={name} is the name of an earlier job of this sweep; put what differs into it, "
            "e.g. \"run_name='beams-${task.num_beams}'\", or leave it out"
        )
    _names.add(name)
