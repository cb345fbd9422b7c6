"""Going on with a run that was interrupted: whether it is the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from blip2x.config.compose import override_key
from blip2x.errors import UserError

AUTO, NEVER = "auto", "never"

# What may be another than in the run that is gone on with: it changes where, how fast, and what is kept. Samples per step and
# micro-batch, and so ranks, are looked at where a training goes on (engine/fit.py).
_FREE_GROUPS = ("parallelism", "logger", "paths", "prune")
_FREE_KEYS = (
    "run",
    "run_name",
    "sweep",
    "objective",
    "objective_of_failed",
    "resume",
    "overwrite",
    "quiet",
    "device",
    "threads",
    "dataset.num_workers",
    "dataset.annotation_cache",
)
_FREE_KEYS += tuple(f"model.{part}.recompute" for part in ("vision", "qformer", "language"))
_FREE_TASK_KEYS = (
    "log_every",
    "eval_every",
    "save_every",
    "keep_last",
    "keep_best",
    "save_in_background",
    "batch_size",
    "accumulate",
    "eval_batch_size",
    "pair_batch_size",
    "patch_memory_gb",
    "patch_dtype",  # of what re-ranking keeps until it is done; no training sees it
    "on_nan",
)
_SHOWN = 5
_FIRST_FILE = "command.txt"  # that a run writes; config.yaml is the last one before its work starts
_BIRTH_FILES = (_FIRST_FILE, "status.json", "overrides.yaml", "versions.json", "hardware.json", "diff.patch")
_BIRTH_FILES += (".status.json.partial", ".config.yaml.partial")


def may_go_on(folder: Path, config: DictConfig) -> bool:
    """Whether `folder` has a run to go on with; an absent folder, or one that was killed at birth, has none yet.

    Raises:
        UserError: it is of a run whose results would be other ones.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        left = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        if not left or (_FIRST_FILE in left and set(left) <= {*_BIRTH_FILES}):
            for name in left:
                (folder / name).unlink()
            if folder.is_dir():
                folder.rmdir()
            return False
        raise UserError(f"{folder} has no config.yaml, so it is no run of blip2x to go on with; choose another run_name")
    try:
        before = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{path} cannot be read ({error}), so the run cannot be gone on with; choose another run_name"
        ) from error
    changes = differences(before, config)
    if changes:
        more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise UserError(
            f"{folder} is of a run with other settings: {'; '.join(changes[:_SHOWN])}{more}. Go on with the same command, or "
            "choose another run_name and start from that run by resume=PATH"
        )
    return True


def began_from(folder: Path) -> str:
    """The `resume` with which the run of `folder` was begun."""
    return str(OmegaConf.load(folder / "config.yaml").resume)


def differences(before: DictConfig, now: DictConfig, *, is_free: Callable[[str], bool] | None = None) -> list[str]:
    """What changes results, as "key was x, is y"; files below a folder of `paths` are known by their names below it.

    `is_free`, where it is given, says instead which keys may differ.
    """
    is_free = is_free or _is_free
    old, new = (_flat(_portable(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)), is_free) for cfg in (before, now))
    absent = "not there"
    return [
        f"{key} was {old.get(key, absent)}, is {new.get(key, absent)}"
        for key in sorted(old.keys() | new.keys())
        # of a key that one version does not know, null says as much as its absence
        if not is_free(key) and old.get(key) != new.get(key)
    ]


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    paths = {name: value for name, value in config.get("paths", {}).items() if isinstance(value, str)}

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: changed(inner) for key, inner in value.items()}
        if isinstance(value, str):
            for name, folder in paths.items():
                if PurePath(folder).parts and PurePath(value).is_relative_to(folder):  # below "." is everything
                    return f"paths.{name}/{PurePath(value).relative_to(folder)}"
        return value

    return changed(config)


def _flat(value: Any, is_free: Callable[[str], bool], prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        inner = (_flat(inner, is_free, f"{prefix}.{key}".lstrip(".")) for key, inner in value.items())
        return {name: found for flat in inner for name, found in flat.items()}
    if prefix == "task.overrides" and value is not None:  # a pipeline's, as typed
        value = [word for word in value if not is_free(override_key(word))]
    return {prefix: value}


def _is_free(key: str) -> bool:
    group, _, name = key.partition(".")
    return group in _FREE_GROUPS or key in _FREE_KEYS or (group == "task" and name in _FREE_TASK_KEYS)
