"""From a checked config to a finished run folder."""

from __future__ import annotations

import time

from blip2x.config.run import RunConfig
from blip2x.engine.memory import peak_memory_mib
from blip2x.engine.report import write_report
from blip2x.engine.run import Run
from blip2x.engine.table import results_table
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import STRATEGIES, TASKS


def launch(cfg: RunConfig, command: list[str]) -> dict[str, dict[str, float] | float]:
    """Run the task of `cfg`; write results.json and report.html, print the table, return the results.

    Args:
        cfg: from `load_config`.
        command: the words that were typed, kept in the run folder.
    """
    started = time.perf_counter()
    context = STRATEGIES.get(cfg.parallelism.kind)(cfg.parallelism, cfg.device)
    task = TASKS.get(cfg.task.kind)
    task.check(cfg)
    seed_everything(cfg.seed, 0)
    run = Run.create(cfg, context, command)
    try:
        title = f"blip2x {cfg.task.kind} · {cfg.model.name} · {cfg.dataset.name} → {run.folder}"
        run.console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        result = task(cfg, run).run()
        results: dict[str, dict[str, float] | float] = dict(result.stages or {cfg.task.kind: result.metrics})
        results["seconds"] = round(time.perf_counter() - started, 1)
        results["peak_memory_gb"] = round(peak_memory_mib() / 2**10, 2)
        run.write_json(results, "results.json")
        if context.is_main:
            run.console.print(results_table(results))
            run.console.print(f"report: {write_report(run.folder)}", markup=False, highlight=False, soft_wrap=True)
        return results
    finally:
        run.close()
