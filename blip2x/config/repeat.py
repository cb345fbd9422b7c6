"""``run=outputs/NAME``: what a finished run was made of, in the place of the groups of conf/."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from blip2x.config.auto import CONF_FOLDER
from blip2x.config.run import RunConfig
from blip2x.config.task import PipelineConfig
from blip2x.errors import UserError

MAIN = "config"  # conf/config.yaml
CONFIG_FILE = "config.yaml"  # in a run folder
FREE_GROUPS = ("parallelism", "logger", "paths")  # where and how fast; all other options are what the run is
_OF_THE_COMMAND = (
    "run",
    "run_name",
    "overwrite",
    "sweep",
    "quiet",
    "objective",
    "objective_of_failed",
    "prune",
)  # not of what it does: as conf/config.yaml has them
_MOVABLE = ("data", "weights", "cache")  # of `paths`: what is below them moves with them

Values = Mapping[str, Any]


def primary_config(overrides: Sequence[str]) -> str:
    """Hydra's name of what `overrides` hold for: conf/config.yaml or, where `run` is set, that run's own config.

    Raises:
        UserError: there is no such run, its config cannot be read or is not of this version, or an override chooses an option
            of a group that makes the run what it is.
    """
    folder = repeated_run(overrides)
    if folder is None:
        return MAIN
    values = dict(read_config(folder))
    if values.get("resume") == "auto":  # with the same folder; the repeat is a run of its own
        values["resume"] = "never"
    if values.get("sweep") and (outputs := (values.get("paths") or {}).get("outputs")):
        # <paths.outputs>/sweeps/<sweep>, where a repeat would count as one more of the sweep's runs
        values["paths"] = {**values["paths"], "outputs": str(Path(outputs).parent.parent)}
    if (values.get("task") or {}).get("kind") == PipelineConfig.kind:
        _check_pipeline(folder, overrides)
        values["task"] = {**values["task"], "overrides": None}  # those of this command
    return stored_config("repeat", values, overrides, folder / CONFIG_FILE)


def repeated_run(overrides: Sequence[str]) -> Path | None:
    """The run folder that `overrides` name by ``run=``.

    Raises:
        UserError: they name several.
    """
    folder = None
    for word in overrides:
        key, _, value = word.partition("=")
        if key.lstrip("+") != "run":
            continue
        if not Path(value).is_dir():  # a name that Hydra would read otherwise is taken as it is
            try:
                override = OverridesParser.create().parse_override(word)
            except HydraException:
                value = value.strip("'\"")
            else:
                if override.is_sweep_override():
                    raise UserError(f"{word}: run= takes one run; to repeat several, type a command for each")
                value = override.value()
        folder = None if value is None or value == "" else Path(str(value))
    return folder


def stored_config(name: str, values: Values, overrides: Sequence[str], source: Path) -> str:
    """Keep `values`, a whole config as a dictionary, where Hydra finds it as primary config `name`; returns `name`.

    Args:
        name: known to Hydra until another config is kept under it.
        values: by group and key, resolved.
        overrides: what Hydra is to put on top.
        source: the file that has the values, for messages.

    Raises:
        UserError: as `primary_config`.
    """
    main = yaml.safe_load((CONF_FOLDER / f"{MAIN}.yaml").read_text(encoding="utf-8"))
    root = {field.name for field in fields(RunConfig)}
    values = {**values, **{key: main[key] for key in _OF_THE_COMMAND if key in root & main.keys()}}
    values = {**{key: value for key, value in main.items() if key in root}, **values}  # keys that came later
    chosen = _chosen_groups(overrides, source.parent)
    typed_values = _typed(RunConfig, _placed({key: value for key, value in values.items() if key not in chosen}), source)
    hydra_options = [entry for entry in main["defaults"] if isinstance(entry, dict) and "hydra/" in next(iter(entry))]
    store = ConfigStore.instance()
    store.store(group="schema/root", name=name, node=typed_values)
    defaults = [f"/schema/root/{name}@_here_", "_self_", *({group: None} for group in chosen), *hydra_options]
    store.store(name=name, node={"defaults": defaults, "hydra": main["hydra"]})
    return name


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the run in `folder`, as it was resolved.

    Raises:
        UserError: it is no run folder, or its config is damaged.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(f"run={folder}: there is no such folder; give the folder of a run, e.g. run=outputs/NAME")
    if not path.is_file():
        hint = f"; to repeat the run it is of: run={folder.parent}" if (folder.parent / CONFIG_FILE).is_file() else ""
        raise UserError(f"run={folder} has no {CONFIG_FILE}, so it is no run folder{hint}")
    try:
        values = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}), so the run cannot be repeated") from error
    if not isinstance(values, dict) or not isinstance(values.get("task"), dict):
        raise UserError(f"{path} is damaged (it has no task), so the run cannot be repeated")
    return values


def config_of(folder: Path) -> DictConfig:
    """As `read_config`, for omegaconf."""
    return OmegaConf.create(_each(literal, read_config(folder)))


def literal(value: str) -> str:
    """`value` as omegaconf has to be given it, so that it refers to no other key."""
    # its grammar reads a backslash as itself, except in a row of them before what is escaped
    return re.sub(r"(\\*)\$\{", lambda row: row[1] * 2 + r"\${", value)


def _chosen_groups(overrides: Sequence[str], folder: Path) -> list[str]:
    """The groups of which `overrides` choose an option."""
    chosen = []
    for word in overrides:
        key = word.lstrip("+~").split("=", 1)[0].split("@")[0]
        is_override = "=" in word or word.startswith("~")  # else a word of an option, as in --package optim
        if not (is_override and key and (CONF_FOLDER / key).is_dir()):
            continue
        if key not in FREE_GROUPS:
            raise UserError(
                f"run={folder} is repeated with its own {key}, so {word} cannot choose another; set single keys on top, or "
                f"type the command in {folder / 'command.txt'} with {word} (only {', '.join(FREE_GROUPS)} may be chosen anew)"
            )
        chosen.append(key)
    return list(dict.fromkeys(chosen))


def _check_pipeline(folder: Path, overrides: Sequence[str]) -> None:
    for word in overrides:
        if word.lstrip("+~").startswith("task."):
            raise UserError(
                f"run={folder} repeats a pipeline with the stages that it had, so {word} cannot be set; type the command in "
                f"{folder / 'command.txt'} with it, or set what all stages share, such as seed"
            )


def _placed(values: Values) -> dict[str, Any]:
    """With references to `paths` where a value is a place below one of them, and no other references."""
    paths = values.get("paths") or {}
    bases = {name: str(paths[name]) for name in _MOVABLE if paths.get(name) and PurePath(str(paths[name])).parts}

    def place(value: str) -> str:
        for name, base in sorted(bases.items(), key=lambda item: -len(item[1])):
            if value.startswith(f"{base}/"):
                return f"${{paths.{name}}}{literal(value[len(base) :])}"
        return literal(value)

    return {key: _each(literal if key == "paths" else place, value) for key, value in values.items()}


def _each(change: Callable[[str], str], value: Any) -> Any:
    """`value` with all its strings changed, at whatever depth."""
    if isinstance(value, Mapping):
        return {key: _each(change, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each(change, inner) for inner in value]
    return change(value) if isinstance(value, str) else value


def _typed(cls: type, values: Values, source: Path, prefix: str = "") -> DictConfig:
    """`values` in the dataclasses that composing made them of; keys that are absent are missing."""
    node = OmegaConf.structured(cls)
    hints = get_type_hints(cls)
    for name, value in values.items():
        key = f"{prefix}.{name}".lstrip(".")
        try:
            node[name] = _typed_value(hints.get(name), value, source, key)
        except OmegaConfBaseException as error:
            reason = str(error.msg).splitlines()[0]
            raise UserError(f"{source}: this version does not take its {key}: {reason}") from error
    return node


def _typed_value(hint: Any, value: Any, source: Path, key: str) -> Any:
    if get_origin(hint) is Union:  # Optional
        hint = next(inner for inner in get_args(hint) if inner is not type(None))
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _typed(_schema(hint, value, source, key), value, source, key)
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]) and isinstance(value, Mapping):
        return {name: _typed_value(get_args(hint)[1], inner, source, f"{key}.{name}") for name, inner in value.items()}
    if get_origin(hint) is list and is_dataclass(get_args(hint)[0]) and isinstance(value, list):
        return [_typed_value(get_args(hint)[0], inner, source, f"{key}[{index}]") for index, inner in enumerate(value)]
    return copy.deepcopy(value)


def _schema(base: type, values: Values, source: Path, key: str) -> type:
    """The dataclass below `base` whose kind `values` have; where that kind is an option's own, the one with the same keys."""
    known = [base, *_subclasses(base)]
    kind = values.get("kind", MISSING)
    of_kind = [cls for cls in known if getattr(cls, "kind", MISSING) == kind]
    alike = [cls for cls in known if {field.name for field in fields(cls)} == values.keys()]
    found = [cls for cls in alike if cls in of_kind] or of_kind or alike
    if not found:
        raise UserError(f"{source}: this version does not know {key}.kind={kind}, so the run cannot be repeated")
    return found[0]


def _subclasses(cls: type) -> list[type]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]
