"""From a checked config to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from blip2x.config.repeat import config_of
from blip2x.config.run import RunConfig
from blip2x.engine.amp import autocast, check_precision
from blip2x.engine.memory import begin_peak, peak_memory_gb
from blip2x.engine.pruning import Pruned
from blip2x.engine.repeat import compare, environment_changes, environment_now, environment_of, sentence
from blip2x.engine.report import write_report
from blip2x.engine.resume import differences
from blip2x.engine.run import RESULTS_FILE, Run
from blip2x.engine.status import State, end_status, read_status
from blip2x.engine.table import results_table
from blip2x.errors import Interrupted, UserError
from blip2x.parallel.context import Context
from blip2x.parallel.devices import process_rank, select_device
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import STRATEGIES, TASKS

REPEAT_FILE = "repeat.json"  # what came of the repeat of a run
_SHOWN = 5


def launch(cfg: RunConfig, command: list[str]) -> dict[str, dict[str, float] | float]:
    """Run the task of `cfg`; write results.json and report.html, print the table, return the results.

    How far it has come stands in status.json from the moment the run folder is there.

    Args:
        cfg: from `load_config`.
        command: the words that were typed, kept in the run folder.

    Raises:
        UserError: something that the user gave is wrong.
        Interrupted: the process was asked to stop.
    """
    started = time.perf_counter()
    task = TASKS.get(cfg.task.kind)
    if not task.computes and process_rank() > 0:
        return {}  # rank 0 alone does it
    if task.computes:
        context = STRATEGIES.get(cfg.parallelism.kind)(cfg.parallelism, cfg.device)
        check_precision(cfg, context.device)
    else:
        context = Context(device=select_device(cfg.device))
    task.check(cfg)
    seed_everything(cfg.seed, 0)
    measured = context.device if task.computes else "cpu"
    begin_peak(measured)
    run = Run.create(cfg, context, command)
    try:
        with run, _reporting_failure(run), _noting_end(run):
            title = f"blip2x {cfg.task.kind} · {cfg.model.name} · {cfg.dataset.name} → {run.folder}"
            run.console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
            changes = context.on_main(lambda: _tell_changes(cfg, run))
            results = context.broadcast_object(run.read_json(RESULTS_FILE)) if run.goes_on else None
            if results and "seconds" in results:  # which only a run that came to its end has
                run.console.print("this run is complete; there is nothing to go on with")
            else:
                try:
                    with autocast(cfg.precision, context.device) if task.computes else nullcontext():
                        result = task(cfg, run).run()
                    results = dict(result.stages or {cfg.task.kind: result.metrics})
                except Pruned as stop:
                    run.console.print(f"stopped: {stop}", style="yellow", markup=False)
                    done = context.broadcast_object(run.read_json(RESULTS_FILE)) or {}  # a pipeline's stages before
                    results = {**done, "pruned": stop.step}  # what it measured on its way is in metrics.jsonl
                results["seconds"] = round(time.perf_counter() - started, 1)
                if run.goes_on:
                    results["starts"] = run.starts  # the seconds are the last one's
                if (memory := peak_memory_gb(measured)) is not None:
                    results["peak_memory_gb"] = round(memory, 2)
                run.write_json(results, RESULTS_FILE)
                run.log_results(results)
            if context.is_main:
                run.console.print(results_table(results))
                _report(run)
                if cfg.run and Path(cfg.run).resolve() != run.root.resolve():  # else it is gone on with itself
                    _compare_with_original(Path(cfg.run), run, changes)
            return results
    except Interrupted as stop:
        if stop.together:
            context.barrier()  # launchers stop the other ranks when one has left, before they have their exit code
        words = [*([f"run={cfg.run}"] if cfg.run else []), f"run_name={run.root.name}", "resume=auto"]
        raise Interrupted(f"{stop}; {' '.join(words)} goes on with it") from None


def _report(run: Run) -> None:
    """Write the report of a run whose results are there already, so that nothing about it makes the run a failed one."""
    try:
        run.console.print(f"report: {write_report(run.folder)}", markup=False, highlight=False, soft_wrap=True)
    except Exception as error:
        run.console.print(f"warning: no report: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        run.log_traceback(error)


@contextmanager
def _reporting_failure(run: Run) -> Iterator[None]:
    """A run that did not come to its end has a report of what it did; what keeps that from being written hides no error."""
    try:
        yield
    except BaseException:
        if run.context.is_main:
            with suppress(Exception):
                write_report(run.folder)
        raise


@contextmanager
def _noting_end(run: Run) -> Iterator[None]:
    """Say in status.json how the run ends, and in log.txt what ends it before its time; of a complete one nothing changes."""
    if not run.context.is_main or read_status(run.folder).get("state") == State.complete.value:
        yield
        return
    try:
        yield
    except BaseException as error:
        if isinstance(error, (UserError, Interrupted)):
            run.log_line(f"{'error' if isinstance(error, UserError) else 'interrupted'}: {error}")
        else:
            run.log_traceback(error)
        end_status(run.folder, error)
        raise
    end_status(run.folder)


def _tell_changes(cfg: RunConfig, run: Run) -> dict[str, list[str]]:
    """Print and return what is not as it was in the run that is repeated or gone on with."""
    original = Path(cfg.run) if cfg.run else run.folder
    if not (cfg.run or run.goes_on):
        return {}
    now = environment_now(run.context) if run.goes_on else environment_of(run.folder)
    changes = {"environment": environment_changes(environment_of(original), now)}
    if cfg.run:
        settings = differences(config_of(original), config_of(run.folder))
        changes["settings"] = [change for change in settings if not change.startswith("task.overrides ")]
    for kind, found in changes.items():
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            end = "; figures may differ" if kind == "environment" else ""
            text = f"{kind} not as in {original}: {'; '.join(found[:_SHOWN])}{more}{end}"
            run.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
    return changes


def _compare_with_original(original: Path, run: Run, changes: dict[str, list[str]]) -> None:
    found = compare(original, run.folder)
    run.console.print(sentence(original, found), markup=False, highlight=False, soft_wrap=True)
    record = {"of": str(original), "identical": found.is_identical if found else None, "changed": changes}
    run.write_json({**record, **(asdict(found) if found else {})}, REPEAT_FILE)
