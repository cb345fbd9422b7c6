"""From a checked config to a finished run folder."""

from __future__ import annotations

import time
from contextlib import closing, nullcontext

from blip2x.config.run import RunConfig
from blip2x.engine.amp import autocast, check_precision
from blip2x.engine.memory import peak_memory_mib
from blip2x.engine.pruning import Pruned
from blip2x.engine.report import write_report
from blip2x.engine.run import Run
from blip2x.engine.table import results_table
from blip2x.errors import Interrupted
from blip2x.parallel.context import Context
from blip2x.parallel.devices import process_rank, select_device
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import STRATEGIES, TASKS

RESULTS_FILE = "results.json"


def launch(cfg: RunConfig, command: list[str]) -> dict[str, dict[str, float] | float]:
    """Run the task of `cfg`; write results.json and report.html, print the table, return the results.

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
    run = Run.create(cfg, context, command)
    try:
        with closing(run):
            title = f"blip2x {cfg.task.kind} · {cfg.model.name} · {cfg.dataset.name} → {run.folder}"
            run.console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
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
                results["peak_memory_gb"] = round(peak_memory_mib() / 2**10, 2)
                run.write_json(results, RESULTS_FILE)
            if context.is_main:
                run.console.print(results_table(results))
                run.console.print(f"report: {write_report(run.folder)}", markup=False, highlight=False, soft_wrap=True)
            return results
    except Interrupted as stop:
        if stop.together:
            context.barrier()  # launchers stop the other ranks when one has left, before they have their exit code
        raise Interrupted(f"{stop}; run_name={run.root.name} resume=auto goes on with it") from None
