"""Sweeps (``-m``): where their jobs go, how these are called, and what tells a job that it is one of several."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.compose import command_overrides, override_key, quoted
from blip2x.errors import UserError

_LONGEST_NAME = 100  # characters; file systems take 255 bytes
_PLUGINS = {  # option of hydra/launcher or hydra/sweeper -> its module and the extra that brings it
    "joblib": ("hydra_joblib_launcher", "sweeps"),
    "optuna": ("hydra_optuna_sweeper", "sweeps"),
    "submitit_local": ("hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_submitit_launcher", "slurm"),
}
_NOT_IN_NAMES = ("sweep", "run_name", "overwrite", "resume")  # of a job of which nothing is swept

_names: set[str] = set()


def in_sweep() -> bool:
    """Whether this job is one of several."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def sweep_folder() -> Path:
    """Where this job's sweep has its runs."""
    return Path(HydraConfig.get().sweep.dir)


def launcher() -> str:
    """What starts this sweep's jobs: the option of hydra/launcher."""
    return HydraConfig.get().runtime.choices["hydra/launcher"]


def job_command(command: list[str]) -> list[str]:
    """The words that repeat this job alone; `command` started the program."""
    if not in_sweep():
        return command
    program = command[0] if launcher() == "basic" else "runners/run.py"  # another process's own words are the launcher's
    words = [word for word in command_overrides() if override_key(word) != "sweep"]
    typed = "hydra.mode=MULTIRUN" in HydraConfig.get().overrides.hydra
    return [program, *words, *([] if typed else ["hydra.mode=RUN"])]  # where it is an experiment that says -m


def job_name() -> str:
    """The name of this job's folder: the overrides in which the jobs of its sweep differ."""
    unswept = set(HydraConfig.get().job.config.override_dirname.exclude_keys)
    return folder_name([word for word in command_overrides() if override_key(word) not in unswept])


def folder_name(words: Sequence[str]) -> str:
    """``optim.lr=1e-4,seed=2`` of the overrides `words`; where characters had to go, they are told apart by a hash."""
    whole = ",".join(words) or "job"
    plain = re.sub(r"_*([,=])_*", r"\1", re.sub(r"[^\w.,=+@-]+", "_", whole, flags=re.ASCII)).strip("_.,")
    if plain == whole and len(plain) <= _LONGEST_NAME:
        return plain
    return f"{plain[:_LONGEST_NAME].rstrip('_.,')}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def claim_run_name(name: str | None) -> None:
    """Raise `UserError` where an earlier job of this sweep has the name, and so the folder."""
    if name is None or not in_sweep():
        return
    if name in _names:
        raise UserError(
            f"run_name={name} is the name of an earlier job of this sweep; put what differs into it, "
            "e.g. \"run_name='beams-${task.num_beams}'\", or leave it out"
        )
    _names.add(name)


def begin_sweep(config: DictConfig) -> Path:
    """Tell the jobs, by overrides of Hydra's own part of `config`, the sweep's folder and in which keys they differ.

    Returns:
        The folder; it need not exist.

    Raises:
        UserError: the sweep's name is no plain folder name, or a search has nothing to optimise.
    """
    hydra = config.hydra
    params = hydra.sweeper.get("params") or {}
    words = list(hydra.overrides.task)
    swept = {str(key) for key in params}
    swept |= {word.get_key_element() for word in OverridesParser.create().parse_overrides(words) if word.is_sweep_override()}
    swept = {override_key(key) for key in swept}
    keys = {override_key(word) for word in words}
    unswept = sorted(keys - swept if swept else keys & set(_NOT_IN_NAMES))

    name = config.sweep
    if name is None:
        parts = {"task": config.task.kind, "model": config.model.name, "dataset": config.dataset.name}
        name = "-".join([*(value for group, value in parts.items() if group not in swept), time.strftime("%Y%m%d-%H%M%S")])
    elif name in ("", ".", "..") or Path(name).name != name:
        raise UserError(f"sweep={name} must be a plain folder name, without slashes; choose the place with paths.outputs")
    if hydra.runtime.choices["hydra/sweeper"] == "optuna":
        if config.objective is None:
            raise UserError("hydra/sweeper=optuna optimises a metric: set objective=STAGE.METRIC, e.g. objective=caption.CIDEr")
        if hydra.sweeper.sampler.get("seed", 0) is None:
            hydra.sweeper.sampler.seed = config.seed  # a sweep that is started again asks for the same runs
    folder = Path(config.paths.outputs) / "sweeps" / name
    hydra.sweep.dir = str(folder)
    hydra.overrides.hydra += [
        f"hydra.sweep.dir={quoted(str(folder))}",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(quoted, unswept))}]",
    ]
    return folder


def require_plugins(words: Sequence[str]) -> None:
    """Raise `UserError` where the command `words`, or the experiment that it names, asks for a plugin that is not installed."""
    asked = "\n".join(words)
    for name in re.findall(r"^\+?experiment=([\w.,+-]+)$", asked, re.MULTILINE):
        files = [CONF_FOLDER / "experiment" / f"{part}.yaml" for part in name.split(",")]
        asked += "".join("\n" + file.read_text(encoding="utf-8") for file in files if file.is_file())
    for group, option in re.findall(r"hydra/(launcher|sweeper)(?:=|: *)(\w+)", asked):
        module, extra = _PLUGINS.get(option, ("", ""))
        if module and importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            package = module.replace("_", "-")
            raise UserError(f"hydra/{group}={option} needs {package}: pip install -c constraints.txt -e '.[{extra}]'")
