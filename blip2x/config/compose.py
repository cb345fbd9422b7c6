"""Composing a config inside the program: for the stages of a pipeline, for tests and notebooks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.load import load_config
from blip2x.config.repeat import literal, primary_config, stored_config
from blip2x.config.run import RunConfig
from blip2x.errors import UserError

# what belongs to a run itself and not to the tasks inside it
OWN_KEYS = ("task", "run", "run_name", "runs", "sweep", "quiet", "overwrite", "resume")
_OF_NO_USE = ("full_key:", "object_type=", "reference_type=", "See https://")
_PLAIN = re.compile(r"[\w./+-]+=[\w./+-]*")  # words that Hydra reads as they are


def compose_dict(overrides: list[str]) -> DictConfig:
    """What Hydra makes of `overrides`, unchecked.

    Raises:
        UserError: an override names a key or an option that does not exist, or has the wrong type; or `run` no run.
    """
    return _compose(primary_config(overrides), spelled(overrides))


def compose_stored(values: dict[str, Any], overrides: list[str], source: Path) -> RunConfig:
    """The checked config that `values`, a whole config that was composed before, become with `overrides` on top.

    Raises:
        UserError: as `compose_dict`, or `values` of the file `source` are not of this version.
    """
    return load_config(_compose(stored_config("stored", values, overrides, source), overrides), overrides)


def _compose(name: str, overrides: list[str]) -> DictConfig:
    running = GlobalHydra.instance().is_initialized()  # inside @hydra.main
    with nullcontext() if running else initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        try:
            return compose(name, overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{' '.join(overrides)}: {composing_mistake(error)}") from error


def compose_config(overrides: list[str]) -> RunConfig:
    """The checked config of the command line ``python runners/run.py <overrides>``."""
    return load_config(compose_dict(overrides), overrides)


def composing_mistake(error: Exception) -> str:
    """What Hydra and omegaconf say of a wrong key, option or value, in one line, without what only their own makers need."""
    texts = [str(error), *([str(error.__cause__)] if isinstance(error.__cause__, OmegaConfBaseException) else [])]
    lines = [line.strip() for text in texts for line in text.partition("Config search path:")[0].splitlines()]
    # to a config that is typed, unlike a dictionary in it, no key can be appended
    useless = (*_OF_NO_USE, *([] if "is not in struct" in " ".join(lines) else ["To append to your config"]))
    return " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(useless)))


def command_overrides() -> list[str]:
    """The overrides of the command whose job Hydra runs; in a sweep, those of this one job."""
    return list(HydraConfig.get().overrides.task)


def is_hydras_job() -> bool:
    """Whether Hydra started what runs here, so that it knows the overrides."""
    return HydraConfig.initialized()


def override_key(override: str) -> str:
    """The key or group that an override sets: "task" of ``task=caption``, "x.y" of ``+x.y=3``."""
    return override.lstrip("+~").split("=", 1)[0].split("@")[0]


def inner_overrides(overrides: Sequence[str]) -> list[str]:
    """Those of a run's `overrides` that hold inside it as well: for stages of a pipeline, for what is looked at or measured."""
    return [word for word in overrides if override_key(word).split(".")[0] not in OWN_KEYS]


def quoted(value: str) -> str:
    """`value` as the right-hand side of an override, whatever characters it has."""
    # hydra's grammar, too, reads a backslash as itself, except in a row of them before what is escaped
    value = re.sub(r"(\\*)('|$)", lambda row: row[1] * 2 + row[2].replace("'", r"\'"), literal(value))
    return f"'{value}'"


def spelled(overrides: Sequence[str]) -> list[str]:
    """`overrides` with the folder after ``run=`` in quotes where Hydra would not read it as it is, for a comma or an "="."""

    def is_read_otherwise(word: str) -> bool:
        return word.startswith("run=") and not _PLAIN.fullmatch(word) and Path(word[len("run=") :]).is_dir()

    return [f"run={quoted(word[len('run=') :])}" if is_read_otherwise(word) else word for word in overrides]
