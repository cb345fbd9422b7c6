"""A run folder as a comparison reads it: what is absent is empty, what is broken is a note, and neither is an error."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from blip2x.config.compose import override_key
from blip2x.engine.comparisons import COST_KEYS, Measure, read_measures
from blip2x.engine.reading import read_json, read_lines

COMPLETE = "complete"
NOT_DIFFERENCES = (  # of a config: where a run went and who was told, not what it did
    "run_name",
    "sweep",
    "resume",
    "overwrite",
    "run",
    "runs",
    "quiet",
    "logger",
    "paths.outputs",
    "paths.cache",
    "task.overrides",  # a pipeline's own words; what they set is in the other keys
    "task.words",
)
_MARKS = ("config.yaml", "results.json", "status.json")  # a folder with one of these is a run's
_STATES = {"running": "running, or killed"}  # status.json cannot tell them apart
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where PyYAML was built with it: twenty times as fast
_TRAINING = "lr"  # only a training's own lines in metrics.jsonl have it, a validation's have not

Scalar = None | bool | int | float | str


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's."""
    return any((folder / name).is_file() for name in _MARKS)


def is_comparison(folder: Path) -> bool:
    """Whether the run is one of task=compare."""
    try:
        with (folder / "config.yaml").open(encoding="utf-8", errors="replace") as file:
            return [next(file, "").strip(), next(file, "").strip()] == ["task:", "kind: compare"]
    except OSError:
        return False


@dataclass
class ComparedRun:
    """One run; its log is read when it is asked for."""

    name: str
    folder: Path
    state: str = ""
    error: str = ""  # of a failed run: the sentence
    config: dict[str, Scalar] = field(default_factory=dict)  # resolved and flat: {"optim.lr": 1e-4, ...}
    typed: frozenset[str] = frozenset()  # keys of the command line
    measures: list[Measure] = field(default_factory=list)
    seconds: float | None = None
    peak_memory_gb: float | None = None
    resumed: bool = False  # the seconds are the last start's
    versions: dict[str, Scalar] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether it came to its end, so that its figures are final."""
        return self.state == COMPLETE

    @property
    def report(self) -> Path | None:
        """Its page, where it has one."""
        page = self.folder / "report.html"
        return page if page.is_file() else None

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that can be read and have a stage and a step."""
        rows = read_lines(self.folder / "metrics.jsonl", self.notes)
        return [row for row in rows if isinstance(row.get("stage"), str) and _finite(row.get("step")) is not None]


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Each of `folders`, named by what its path has of its own."""
    return [_read(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def shown(value: Scalar) -> str:
    """A config's value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.15g}".replace("e-0", "e-")
    return "null" if value is None else str(value)


def _names(folders: Sequence[Path]) -> list[str]:
    paths = [folder.resolve() for folder in folders]
    shared = 0
    if len(set(paths)) > 1:
        parts = [path.parts for path in paths]
        while len({each[: shared + 1] for each in parts}) == 1:
            shared += 1
        shared = min(shared, min(map(len, parts)) - 1)
        return ["/".join(each[shared:]) for each in parts]
    return [path.name for path in paths]


def _read(folder: Path, name: str) -> ComparedRun:
    run = ComparedRun(name, folder)
    run.config = flat_config(_config(run))
    run.typed = _typed(folder / "command.txt")
    results = read_json(folder / "results.json", run.notes)
    status = read_json(folder / "status.json", run.notes)
    # runs before there was a status.json: only one that came to its end has its seconds
    state = str(status.get("state") or (COMPLETE if "seconds" in results else "not finished"))
    run.state = _STATES.get(state, state)
    if state == COMPLETE and "pruned" in results:  # its figures are those of the way
        run.state = f"stopped at step {results['pruned']}"
    run.error = str(status.get("error") or "")
    run.seconds, run.peak_memory_gb = (_finite(results.get(key)) for key in COST_KEYS)
    starts = _finite(results.get("starts")) or 1
    if starts > 1:
        run.resumed = True
        run.notes.append(f"started {starts:.0f} times; its seconds are the last start's and take no part")
    run.versions = {key: value for key, value in read_json(folder / "versions.json", run.notes).items() if _is_scalar(value)}
    measured = {key: value for key, value in results.items() if isinstance(value, dict)}
    if not run.complete:
        measured = {**_validations(run.log), **measured}
    try:
        run.measures = read_measures(measured)
    except (TypeError, ValueError, AttributeError, OverflowError):
        run.notes.append("results.json is not what a run writes, and was left out")
    return run


def flat_config(config: dict[str, Any]) -> dict[str, Scalar]:
    """A resolved config as {"optim.lr": 1e-4}, without `NOT_DIFFERENCES`.

    Each override of a pipeline's stages, or of the tasks that a benchmark measured, has a key.
    """
    flat: dict[str, Scalar] = {}
    task = config.get("task")
    if isinstance(task, dict) and isinstance(task.get("stages"), list):
        stages = [stage for stage in task["stages"] if isinstance(stage, dict)]
        config = {**config, "task": {key: value for key, value in task.items() if key != "stages"}}
        names = [str(stage.get("name") or stage.get("task")) for stage in stages]
        flat["task.stages"] = ", ".join(names)
        for name, stage in zip(names, stages, strict=True):
            if stage.get("task") != name:
                flat[f"{name}.task"] = str(stage.get("task"))
            for word in stage.get("overrides") or ():
                flat[f"{name}.{override_key(str(word))}"] = _typed_value(str(word).partition("=")[2])
    if isinstance(task, dict) and task.get("kind") == "benchmark":
        for word in task.get("overrides") or ():
            flat[f"measured.{override_key(str(word))}"] = _typed_value(str(word).partition("=")[2])
    _flatten("", config, flat)
    return {key: value for key, value in flat.items() if not _belongs(key, NOT_DIFFERENCES)}


def _belongs(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def _flatten(prefix: str, value: Any, flat: dict[str, Scalar]) -> None:
    if isinstance(value, dict) and (value or not prefix):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), inner, flat)
    else:
        flat[prefix] = value if _is_scalar(value) else json.dumps(value, ensure_ascii=False, default=str)


def _typed_value(text: str) -> Scalar:
    """As YAML reads it, but that 1e-4 is a number as well."""
    try:
        return float(text) if not text.lstrip("+-").isdigit() else int(text)
    except ValueError:
        return {"true": True, "false": False, "null": None}.get(text.lower(), text.strip("'\""))


def _typed(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return frozenset(override_key(word) for line in lines for word in shlex.split(line)[1:])
    except (OSError, ValueError):  # then no key is known to have been chosen by hand
        return frozenset()


def _config(run: ComparedRun) -> dict[str, Any]:
    try:
        config = yaml.load((run.folder / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER)
        if isinstance(config, dict):
            return config
        run.notes.append("config.yaml has no keys, so it cannot be said in what this run differs")
    except FileNotFoundError:
        run.notes.append("there is no config.yaml, so it cannot be said in what this run differs")
    except (OSError, ValueError, yaml.YAMLError):
        run.notes.append("config.yaml cannot be read, so it cannot be said in what this run differs")
    return {}


def _validations(log: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By stage, the latest value of everything that validations measured."""
    found: dict[str, dict[str, float]] = {}
    for row in log:
        if _TRAINING not in row:
            values = {key: value for key, value in row.items() if key not in ("stage", "step", *COST_KEYS)}
            found.setdefault(row["stage"], {}).update(values)
    return found


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
