"""The jobs of a sweep, told by their folders alone, since launchers run them elsewhere: done, failed, to be gone on with.

Nothing here imports paddle: jobs that are done are passed over in no time.
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from blip2x.config.run import RunConfig
from blip2x.config.task import Best
from blip2x.engine.comparisons import HIGHER, LOWER, direction
from blip2x.engine.folders import append_whole, is_held, write_whole
from blip2x.engine.reading import read_json
from blip2x.engine.resume import AUTO, NEVER, differences
from blip2x.errors import UserError

STATUS_FILE, RESULTS_FILE, CONFIG_FILE = "status.json", "results.json", "config.yaml"
FAILURES_FILE = "failures.jsonl"  # in the sweep's folder: of the command that works on it, or was the last to
COMPLETE, FAILED, INTERRUPTED = "complete", "failed", "interrupted"
SEARCH_FILE = "optimization_results.yaml"  # of hydra/sweeper=optuna
# What a run that is complete need not be made again for; every other key, its cost included, is what a sweep may be about
_FREE_GROUPS = ("logger", "paths", "prune")
_FREE_KEYS = ("resume", "overwrite", "run_name", "sweep", "objective", "objective_of_failed", "threads", "quiet", "run", "runs")


def place(config: RunConfig, folder: Path, *, is_main: bool = True) -> bool:
    """Have the run of `config` be made in `folder`, where it has begun be gone on with; whether it still has to run.

    Args:
        config: it is changed: where the run goes, and its `resume`.
        folder: the job's; what an attempt has left there that did not come to be a run is removed, by rank 0.
        is_main: whether this is rank 0.

    Raises:
        UserError: the folder has a run of another config, and `overwrite` is false.
    """
    config.sweep, config.run_name, config.paths.outputs = folder.parent.name, folder.name, str(folder.parent)
    before = folder / CONFIG_FILE
    if not before.is_file():
        if is_main:
            (folder / STATUS_FILE).unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if folder.is_dir() and config.resume == NEVER and not config.overwrite:
            config.resume = AUTO  # which takes away what a run has left that was killed at its birth
        return True
    if config.overwrite:
        return True
    try:
        changes = differences(OmegaConf.load(before), OmegaConf.structured(config), is_free=_is_free)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{before} cannot be read ({error}); remove the folder, or give the sweep another name") from error
    if changes:
        raise UserError(
            f"{folder} has a run with another config: {'; '.join(changes)}. Give the sweep another name, or replace what it "
            "has with overwrite=true"
        )
    if state(folder) == COMPLETE:
        return False
    if config.resume == NEVER or Path(config.resume).is_dir():
        config.resume = AUTO
    return True


def state(folder: Path) -> str | None:
    """What status.json says of a run; where that is absent, whether it came to its end. None: nothing is known."""
    if "state" in (status := read_json(folder / STATUS_FILE)):
        return status["state"]
    return COMPLETE if "seconds" in read_json(folder / RESULTS_FILE) else None


def record(folder: Path, state: str, error: str) -> None:
    """Say in status.json that the run of `folder`, which need not exist, has failed or was interrupted, unless it says so.

    Nothing is said of a run that a process is working on.
    """
    status = read_json(folder / STATUS_FILE)
    if is_held(folder) or (status.get("state") == state and status.get("error")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    status = {"state": state, "error": error, "started": status.get("started", now), "ended": now}
    write_whole(folder / STATUS_FILE, json.dumps(status, indent=2, ensure_ascii=False) + "\n")


def note_failure(folder: Path, error: str) -> None:
    """Tell the process that started the sweep what became of the job of `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"job": folder.name, "error": error}, ensure_ascii=False) + "\n"
    append_whole(folder.parent / FAILURES_FILE, line)


def objective(folder: Path, key: str) -> float | None:
    """The metric STAGE.METRIC in results.json of a run; None: it has none, or one that is no finite number."""
    stage, _, name = key.partition(".")
    results = read_json(folder / RESULTS_FILE)
    value = results.get(stage, {}).get(name) if name else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def check_objective(folder: Path, key: str) -> None:
    """Raise `UserError` where the run of `folder`, which came to its end, has not the metric that is optimised."""
    results = read_json(folder / RESULTS_FILE)
    known = [f"{stage}.{name}" for stage, metrics in results.items() if isinstance(metrics, dict) for name in metrics]
    if "pruned" not in results and key not in known:
        raise UserError(f"objective={key} is no metric of {folder}; it has {', '.join(known) or 'none'}")


def choose_direction(config: DictConfig) -> None:
    """Have the search of `config` look for what is better of its objective, and say so where that was not typed.

    Raises:
        UserError: the direction that was typed is the worse one, or none was and the metric's name does not tell.
    """
    key, sweeper = config.objective, config.hydra.sweeper
    good = {"max": "maximize", "min": "minimize"}.get(_better(key))
    if not isinstance(sweeper.direction, (str, Enum)):
        raise UserError(f"hydra.sweeper.direction={sweeper.direction}: a search has one objective; give maximize or minimize")
    typed = sweeper.direction if isinstance(sweeper.direction, str) else None  # the plugin's own choice is no text
    if typed not in (None, "maximize", "minimize"):
        raise UserError(f"hydra.sweeper.direction={typed} must be maximize or minimize")
    if typed is None and good is None:
        raise UserError(
            f"objective={key}: say which values are better, by hydra.sweeper.direction=maximize or "
            "hydra.sweeper.direction=minimize"
        )
    if typed and good and typed != good:
        raise UserError(
            f"hydra.sweeper.direction={typed} would call the worst run the best by objective={key}; give "
            f"hydra.sweeper.direction={good}, or leave it out"
        )
    if typed is None:
        sweeper.direction = good
        print(f"search: {good} {key}", flush=True)


def check_pruning(metric: str | None, best_is: Best) -> None:
    """Raise `UserError` where trainings would be stopped for doing well."""
    if metric and _better(metric) not in (None, best_is.value):
        raise UserError(
            f"prune.best_is={best_is.value} would stop the runs that do well by prune.metric={metric}; give "
            f"prune.best_is={_better(metric)}"
        )


def _better(key: str) -> str | None:
    """Whether the "max" or the "min" of STAGE.METRIC is better; None: its name does not tell."""
    return {HIGHER: "max", LOWER: "min"}.get(direction(key.partition(".")[2]))


def failures(folder: Path) -> dict[str, str]:
    """What became of the jobs in the sweep's `folder` that did not come to their end, by their names."""
    found = {}
    for path in sorted(folder.glob(f"*/{STATUS_FILE}")):
        if state(path.parent) == "running":
            found[path.parent.name] = "it has not said how it ended: its process was killed, or is still at work"
    if (folder / FAILURES_FILE).is_file():
        lines = map(json.loads, (folder / FAILURES_FILE).read_text(encoding="utf-8").splitlines())
        found |= {line["job"]: line["error"] for line in lines}
    return found


def compare(folder: Path) -> None:
    """Show the runs in the sweep's `folder` beside each other, in the terminal and in files there."""
    from rich.console import Console

    from blip2x.engine.compare import find_runs, write_comparison  # it draws: nothing for every start
    from blip2x.engine.compared.runs import is_comparison

    if not all(is_comparison(path.parent) for path in folder.glob(f"*/{CONFIG_FILE}")):
        console = Console()
        write_comparison(find_runs(str(folder), console), folder, console)


def tell_best(folder: Path, objective: str) -> None:
    """Print the best run of the search for `objective` that has its runs in `folder`."""
    found = OmegaConf.load(folder / SEARCH_FILE)
    words = " ".join(f"{key}={value}" for key, value in found.best_params.items())
    print(f"best {objective}: {found.best_value:.6g} with {words}")


def _is_free(key: str) -> bool:
    return key.partition(".")[0] in _FREE_GROUPS or key in _FREE_KEYS
