"""In what a run's config differs from the defaults."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import blip2x
from blip2x.config.auto import AUTO
from blip2x.config.compose import compose_dict, quoted
from blip2x.engine.report_sections.rows import Row, look_up
from blip2x.engine.run_files import RunFiles
from blip2x.errors import UserError

_MISSING = "???"
_ABSENT = object()
# where things are, what each run has of its own, and the command's own words, which the other keys hold already
_NOT_COMPARED = ("paths", "run_name", "task.overrides", "task.words")


@dataclass(frozen=True)
class Setting:
    """One key that differs; texts."""

    key: str
    default: str
    own: str


@dataclass(frozen=True)
class Settings:
    """The differences, or the sentence that says why they cannot be told."""

    base: str = ""  # the command whose config the defaults are
    changed: list[Setting] = field(default_factory=list)
    problem: str = ""


class _OtherKeys(Exception):
    """The config has other keys than this version's."""


def changed_settings(run: RunFiles) -> Settings:
    """What `run` has otherwise than the command that names its task, model and data set and nothing else.

    That command is composed now, by this version of blip2x: where another one made the run, its defaults may have been others,
    and the differences cannot be told.
    """
    names = {
        group: look_up(run.config, group, key) for group, key in (("task", "kind"), ("model", "name"), ("dataset", "name"))
    }
    words = [f"{group}={name}" for group, name in names.items()]
    made_by = run.versions.get("blip2x", blip2x.__version__)
    if made_by != blip2x.__version__:
        return Settings(problem=f"the run was made by blip2x {made_by}, this page by {blip2x.__version__}")
    if not all(isinstance(name, str) for name in names.values()):
        return Settings(problem="config.yaml does not name a task, a model and a data set")
    try:
        base = copy.deepcopy(_defaults(tuple(f"{group}={quoted(name)}" for group, name in names.items())))
        for key in base.paths:  # so that the places of its files differ in nothing
            base.paths[key] = look_up(run.config, "paths", key) or base.paths[key]
        free = _free(base)
        plain = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(base, resolve=True)))
        changed = _compare(plain, run.config, free)
    except (UserError, OmegaConfBaseException):
        return Settings(problem=f"this version of blip2x cannot compose {' '.join(words)}")
    except _OtherKeys as error:
        return Settings(problem=f"the run has other keys {error} than this version of blip2x")
    if names["model"] == AUTO:  # takes its shape from the weights
        changed = [setting for setting in changed if setting.default != _text(_MISSING) or setting.key == "model.weights"]
    return Settings(f"python runners/run.py {' '.join(words)}", changed)


@functools.cache
def _defaults(overrides: tuple[str, ...]) -> DictConfig:
    return compose_dict([*overrides])


def _free(node: DictConfig, path: str = "") -> set[str]:
    """Paths of the mappings whose keys are no schema's, such as the parts of a mixture."""
    found = set()
    for key in node:
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            place = f"{path}{key}"
            found |= ({place} if OmegaConf.get_type(child) is dict else set()) | _free(child, f"{place}.")
    return found


def _compare(base: Row, own: Row, free: set[str], path: str = "") -> list[Setting]:
    """What differs, in the order of the config.

    Raises:
        _OtherKeys: mappings of the same kind have other keys.
    """
    place = path.removesuffix(".")
    if place not in free and base.get("kind") == own.get("kind") and base.keys() != own.keys():
        raise _OtherKeys(f"in {place}" if place else "at the top")
    changed = []
    for key in dict.fromkeys([*base, *own]):
        default, value = base.get(key, _ABSENT), own.get(key, _ABSENT)
        here = f"{path}{key}"
        if here in _NOT_COMPARED:
            continue
        if isinstance(default, dict) and isinstance(value, dict):
            changed += _compare(default, value, free, f"{here}.")
        elif default != value:
            changed.append(Setting(here, _text(default), _text(value)))
    return changed


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "\u2013"
    if value == _MISSING:
        return "to be given"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
