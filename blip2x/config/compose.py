"""Composing a config inside the program: for the stages of a pipeline, for tests and notebooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.load import load_config
from blip2x.config.run import RunConfig
from blip2x.errors import UserError

OWN_KEYS = ("task", "run_name", "sweep", "overwrite", "resume")  # what belongs to a run itself and not to the tasks inside it


def compose_dict(overrides: list[str]) -> DictConfig:
    """What Hydra makes of `overrides`, unchecked.

    Raises:
        UserError: an override names a key or an option that does not exist, or has the wrong type.
    """
    running = GlobalHydra.instance().is_initialized()  # inside @hydra.main
    with nullcontext() if running else initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        try:
            return compose("config", overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error


def compose_config(overrides: list[str]) -> RunConfig:
    """The checked config of the command line ``python runners/run.py <overrides>``."""
    return load_config(compose_dict(overrides), overrides)


def command_overrides() -> list[str]:
    """The overrides of the command whose job Hydra runs; in a sweep, those of this one job."""
    return list(HydraConfig.get().overrides.task)


def override_key(override: str) -> str:
    """The key or group that an override sets: "task" of ``task=caption``, "x.y" of ``+x.y=3``."""
    return override.lstrip("+~").split("=", 1)[0].split("@")[0]


def inner_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of a run's `overrides` that hold for the tasks inside it as well: a pipeline's stages, what the doctor looks at."""
    return [word for word in overrides if override_key(word).split(".")[0] not in OWN_KEYS]


def quoted(value: str) -> str:
    """`value` as the right-hand side of an override, whatever characters it has."""
    # both grammars read a backslash as itself, except in a row of them before what is escaped
    value = re.sub(r"(\\*)\$\{", lambda row: row[1] * 2 + r"\${", value)  # omegaconf's: no reference to another key
    value = re.sub(r"(\\*)('|$)", lambda row: row[1] * 2 + row[2].replace("'", r"\'"), value)  # hydra's
    return f"'{value}'"
