"""Whether a run that repeats another came out as that one did, and what is not as it was then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blip2x
from blip2x.engine.hardware import hardware
from blip2x.engine.loggers import metric_lines
from blip2x.engine.reading import read_json
from blip2x.engine.run_files import TIMES
from blip2x.engine.versions import git_diff, versions
from blip2x.parallel.context import Context

# of hardware.json: what arithmetic depends on
_OF_RESULTS = ("cpu", "gpus", "cuda", "device", "ranks", "threads")
_COST = ("seconds", "peak_memory_gb", "starts")  # in results.json, and not what came out
_SHOWN = 4


@dataclass
class Comparison:
    """What two runs have in common and where they differ."""

    compared: dict[str, int] = field(default_factory=dict)  # by kind: how many values, lines or files
    differences: list[dict[str, Any]] = field(default_factory=list)  # {"metric", "was", "is"}, null where there is none
    first_line: dict[str, Any] | None = None  # of metrics.jsonl that differs: {"stage", "step", "metric", "was", "is"}
    predictions: list[str] = field(default_factory=list)  # files that differ

    @property
    def is_identical(self) -> bool:
        """Whether all is equal, bit for bit."""
        return not (self.differences or self.first_line or self.predictions)


def environment_of(folder: Path) -> dict[str, Any]:
    """What results depend on beside the config, of the run in `folder`; what was not written down is absent."""
    return _environment(read_json(folder / "versions.json"), read_json(folder / "hardware.json"), _bytes(folder / "diff.patch"))


def environment_now(context: Context) -> dict[str, Any]:
    """What results depend on beside the config, here."""
    return _environment(versions(), hardware(context), git_diff(Path(blip2x.__file__).parent))


def _environment(found: Mapping[str, Any], machine: Mapping[str, Any], patch: bytes | None) -> dict[str, Any]:
    return {**found, **{key: machine[key] for key in _OF_RESULTS if key in machine}, "patch": _changes_in(patch)}


def _changes_in(patch: bytes | None) -> bytes:
    """Without the lines before the first change, which name what is not in it."""
    return b"diff --git" + patch.partition(b"diff --git")[2] if patch else b""


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, as "numpy was 1.26, is 1.27"; of what one of them does not know, nothing is said."""
    changes = []
    for key in before.keys() & now.keys() - {"git_dirty", "patch"}:
        if before[key] != now[key]:
            old, new = (str(value)[:8] if key == "git_commit" else _said(value) for value in (before[key], now[key]))
            changes.append(f"{key} was {old}, is {new}")
    if before.get("git_commit") and before.get("patch") != now.get("patch"):
        changes.append("uncommitted changes of the code differ (diff.patch)")
    return sorted(changes)


def compare(original: Path, repeat: Path) -> Comparison | None:
    """Compare results, metrics and predictions; None: `original` has no results, for it did not come to its end.

    Times, memory and what else a run costs are no result.
    """
    was, now = (_flat(read_json(folder / "results.json")) for folder in (original, repeat))
    if "seconds" not in was:
        return None
    found = Comparison()
    values = [key for key in {**was, **now} if key.rpartition("/")[2] not in (*_COST, *TIMES)]
    found.compared["results"] = len(values)
    found.differences = [
        {"metric": key, "was": was.get(key), "is": now.get(key)} for key in values if not _same(was.get(key), now.get(key))
    ]
    old, new = (dict(_lines(folder / "metrics.jsonl")) for folder in (original, repeat))
    found.compared["lines of metrics"] = len(old.keys() | new.keys())
    found.first_line = next(filter(None, (_line_difference(key, old, new) for key in {**old, **new})), None)
    files = {path.relative_to(folder) for folder in (original, repeat) for path in folder.glob("**/predictions.jsonl")}
    found.compared["files of predictions"] = len(files)
    found.predictions = sorted(str(name) for name in files if _bytes(original / name) != _bytes(repeat / name))
    return found


def sentence(original: Path, found: Comparison | None) -> str:
    """What the terminal says about it."""
    if found is None:
        return f"{original} did not come to its end, so there is nothing to compare with"
    if found.is_identical:
        counts = ", ".join(f"{count} {kind}" for kind, count in found.compared.items() if count)
        return f"identical to {original}: {counts}"
    parts = [f"{row['metric']} {_change(row['was'], row['is'])}" for row in found.differences[:_SHOWN]]
    if len(found.differences) > _SHOWN:
        parts.append(f"{len(found.differences) - _SHOWN} results more")
    if found.first_line:
        line = found.first_line
        where = f"{line['stage']} step {line['step']}"
        parts.append(f"metrics from {where} on: {line['metric']} {_change(line['was'], line['is'])}")
    parts += [f"{name}" for name in found.predictions[:_SHOWN]]
    return f"differs from {original}: {'; '.join(parts)}"


def _line_difference(key: tuple[str, Any, Any], old: dict, new: dict) -> dict[str, Any] | None:
    was, now = old.get(key), new.get(key)
    where = {"stage": key[0], "step": key[1]}
    if was is None or now is None:
        here = [folder_line is not None for folder_line in (was, now)]
        return {**where, "metric": "the line", "was": _there(here[0]), "is": _there(here[1])}
    names = [name for name in {**was, **now} if name not in TIMES and not _same(was.get(name), now.get(name))]
    return {**where, "metric": names[0], "was": was.get(names[0]), "is": now.get(names[0])} if names else None


def _there(is_there: bool) -> str:
    return "there" if is_there else "not there"


def _lines(path: Path) -> Iterator[tuple[tuple[str, Any, Any], dict[str, Any]]]:
    """The lines by stage, step and what they are about: a step of a training may have a validation as well."""
    for row in metric_lines(path):
        yield (row["stage"], row["step"], "lr" in row), row


def _flat(results: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": inner for name, inner in _flat(value).items()}
        else:
            found[key] = value
    return found


def _same(was: Any, now: Any) -> bool:
    both_nan = all(isinstance(value, float) and math.isnan(value) for value in (was, now))
    return both_nan or was == now


def _change(was: Any, now: Any) -> str:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (was, now))
    by = f" ({now - was:+.2g})" if numbers else ""
    show: Callable[[Any], str] = (lambda value: f"{value:.6g}") if numbers else _said
    return f"was {show(was)}, is {show(now)}{by}"


def _said(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
