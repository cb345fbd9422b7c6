"""Where each value of a config comes from, which Hydra does not keep."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.compose import compose_dict
from blip2x.config.run import RunConfig

COMMAND_LINE = "the command line"
ENVIRONMENT = "the environment"
PROGRAM = "the program"  # after composing, e.g. model=auto
SCHEMA = "the schema"
_ENVIRONMENT_KEY = re.compile(r"\$\{oc\.env:([A-Za-z_0-9]+)")
_CHOSEN = ("conf/experiment/", "conf/recipe/")  # files that a command chooses as a whole, or that come with such a choice


@dataclass(frozen=True)
class Origin:
    """Who set a key last, and whom that one overruled."""

    source: str  # a file below the repository, or what the constants above call
    before: str | None = None  # the source whose value it replaced

    @property
    def is_default(self) -> bool:
        """Whether the value is what the options themselves say, and nobody's wish."""
        return self.source == SCHEMA or (self.source.startswith("conf/") and not self.source.startswith(_CHOSEN))


def options(words: Sequence[str]) -> dict[str, str]:
    """Group -> the option that is chosen, where there is one."""
    known = _plan(tuple(words)).overrides.known_choices
    return {group: option for group, option in known.items() if option and not group.startswith("hydra/")}


def flat(cfg: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, for every leaf; a list is one value."""
    container = OmegaConf.to_container(OmegaConf.structured(cfg), resolve=True, enum_to_str=True)
    return dict(_leaves(container, ""))


def origins(cfg: RunConfig, words: Sequence[str], givers: Mapping[int, str]) -> dict[str, Origin]:
    """The origin of every leaf of `cfg`.

    Args:
        cfg: the checked config.
        words: the overrides that it was composed from.
        givers: place among `words` -> who gave that one; the others are of the command line.

    Raises:
        UserError: the words make no config.
    """
    composed = compose_dict(list(words))
    set_by = _walk(list(words), givers)
    before = dict(_leaves(OmegaConf.to_container(composed, resolve=True, enum_to_str=True), ""))
    found = {}
    for key, value in flat(cfg).items():
        own = _own(key, set_by)
        # a key that composing left open, or gave another value, was filled in by the program: e.g. by model=auto
        filled = key not in before or before[key] == "???" or not _same(before[key], value)
        found[key] = Origin(PROGRAM, own and own.source) if filled else own or Origin(SCHEMA)
    return found


@lru_cache(maxsize=1)
def _plan(words: tuple[str, ...]) -> Any:
    """Hydra's list of what it merges, in its order."""
    running = GlobalHydra.instance().is_initialized()
    with nullcontext() if running else initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        return GlobalHydra.instance().config_loader().compute_defaults_list("config", list(words), RunMode.RUN)


def _walk(words: list[str], givers: Mapping[int, str]) -> dict[str, tuple[int, Origin]]:
    """Key -> (the time at which it was set, its origin)."""
    plan = _plan(tuple(words))
    set_by: dict[str, tuple[int, Origin]] = {}
    clock = itertools.count()

    def put(key: str, value: Any, source: str) -> None:
        if value == {} and (not key or any(other.startswith(f"{key}.") for other in set_by)):
            return  # merging it changes nothing
        known = _own(key, set_by)
        set_by[key] = (next(clock), Origin(source, known and known.source))
        for below in [other for other in set_by if other.startswith(f"{key}.")]:
            del set_by[below]

    for default in plan.defaults:
        path = CONF_FOLDER / f"{default.config_path}.yaml"
        if default.config_path.startswith("hydra/") or not path.is_file():  # the schemas are no files, and set no recipe
            continue
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for name in ("defaults", "hydra"):
            content.pop(name, None)
        for key, value in _leaves(content, default.package or ""):
            if value != "???":
                put(key, value, _of_file(f"conf/{default.config_path}.yaml", value))
    places = {word: place for place, word in enumerate(words)}  # of a word that is there twice, the last one
    for override in plan.config_overrides:
        giver = givers.get(places.get(override.input_line, -1), COMMAND_LINE)
        key = override.key_or_group
        if override.is_delete():
            set_by.pop(key, None)
            continue
        value = override.value()
        for leaf, part in _leaves(value, key) if isinstance(value, dict) else [(key, value)]:
            put(leaf, part, giver)
    return set_by


def _of_file(name: str, value: Any) -> str:
    """A value that a file takes from a variable which is set is the variable's."""
    variable = _ENVIRONMENT_KEY.search(value) if isinstance(value, str) else None
    return f"{ENVIRONMENT}, {variable[1]}" if variable and variable[1] in os.environ else name


def _own(key: str, set_by: Mapping[str, tuple[int, Origin]]) -> Origin | None:
    """The origin of a key: of itself, or of one above that was set later, as a whole."""
    parts = key.split(".")
    known = [set_by[above] for above in (".".join(parts[:count]) for count in range(1, len(parts) + 1)) if above in set_by]
    return max(known, key=lambda entry: entry[0])[1] if known else None


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(key, value)] if key else []
    return [leaf for name, below in value.items() for leaf in _leaves(below, f"{key}.{name}" if key else str(name))]


def _same(one: Any, other: Any) -> bool:
    """YAML reads 1e-3 as a text, which the schema's type makes a number."""
    return one == other or _number(one) == _number(other) is not None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
