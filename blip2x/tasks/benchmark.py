"""What tasks cost, part by part and size by size; docs/benchmark.md says what each figure means and how it is measured."""

from __future__ import annotations

import copy
import gc
import io
import shutil
from typing import Any, ClassVar

from rich.console import Console

from blip2x.config.run import RunConfig
from blip2x.config.tools import BenchmarkConfig
from blip2x.engine.hardware import hardware
from blip2x.engine.loggers import Loggers
from blip2x.engine.progress import ProgressBar
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.engine.versions import versions
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import TASKS
from blip2x.tasks.benchmarking.jobs import Job, job_of
from blip2x.tasks.benchmarking.measure import Measured, measure, steps_of
from blip2x.tasks.benchmarking.models import build
from blip2x.tasks.benchmarking.peak import matrix_peak
from blip2x.tasks.benchmarking.tables import operations, parts_table, rates_table

FILE = "benchmark.json"


@TASKS.register("benchmark")
class Benchmark:
    """All figures are in benchmark.json; the rates and the seconds of each part in results.json, too."""

    computes: ClassVar[bool] = True

    def __init__(self, cfg: RunConfig, run: Run):
        self.cfg, self.run_folder, self.context = cfg, run, run.context
        self.task: BenchmarkConfig = cfg.task

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise `UserError` where something cannot be measured."""
        for name in cfg.task.of:
            job_of(cfg.task, name)

    def run(self) -> TaskResult:
        """Measure the tasks one after the other."""
        run, context = self.run_folder, self.context
        context.barrier()
        peak = max(context.gather_objects(matrix_peak(self.task.matmul_sizes, self.cfg.precision, context.device)))
        run.console.print(f"matrix peak of a rank: {operations(peak)} per second", markup=False, highlight=False)
        results: list[Measured] = []
        for name in self.task.of:
            results.append(self._measure(job_of(self.task, name, context.data_size), peak))
            if context.is_main:
                run.console.print(parts_table(results[-1]))
        if context.is_main:
            run.console.print(rates_table(results))
        self._write(peak, results)
        return TaskResult(stages={found.job.name: found.metrics() for found in results})

    def _measure(self, job: Job, peak: float) -> Measured:
        run = _quiet(self.run_folder)
        seed_everything(self.cfg.seed, self.context.data_rank)
        bar = ProgressBar(self.run_folder.console, job.name, steps_of(job), unit="images")
        try:
            with bar:
                return measure(job, run, lambda job: build(job, run), peak=peak, advance=bar.advance)
        finally:
            gc.collect()  # a model's layers know each other
            self.context.on_main(lambda: shutil.rmtree(run.folder, ignore_errors=True))

    def _write(self, peak: float, results: list[Measured]) -> None:
        record: dict[str, Any] = {
            "hardware": hardware(self.context),
            "versions": versions(),
            "command": (self.run_folder.root / "command.txt").read_text(encoding="utf-8").splitlines()[-1],
            "matrix_peak": peak,
            "tasks": {found.job.name: found.record() for found in results},
        }
        self.run_folder.write_json(record, FILE)


def _quiet(run: Run) -> Run:
    """For a task inside: a folder that is removed afterwards, and a console that nobody reads."""
    folder = run.path("scratch", "x").parent
    console = Console(file=io.StringIO(), width=10_000, color_system=None)
    return Run(folder, folder, run.stage, copy.copy(run.context), console, Loggers())
