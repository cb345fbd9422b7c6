"""What tasks cost, part by part and size by size; docs/benchmark.md says what each figure means and how it is measured."""

from __future__ import annotations

import gc
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from rich.console import Console

from blip2x.config.dataset import Cache
from blip2x.config.run import RunConfig
from blip2x.config.tools import BenchmarkConfig
from blip2x.engine.folders import write_whole
from blip2x.engine.hardware import hardware
from blip2x.engine.loggers import Loggers
from blip2x.engine.progress import ProgressBar
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.engine.versions import versions
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout
from blip2x.parallel.devices import started_processes
from blip2x.parallel.seeding import seed_everything
from blip2x.registry import TASKS
from blip2x.tasks.benchmarking.checks import check_job, check_overrides
from blip2x.tasks.benchmarking.curves import OPERATIONS, Curve, grown_operations, planned
from blip2x.tasks.benchmarking.exponent import exponent
from blip2x.tasks.benchmarking.growth import GROWTHS
from blip2x.tasks.benchmarking.jobs import Job, job_of
from blip2x.tasks.benchmarking.measure import Measured, measure, steps_of
from blip2x.tasks.benchmarking.models import build
from blip2x.tasks.benchmarking.page import page
from blip2x.tasks.benchmarking.peak import matrix_peak
from blip2x.tasks.benchmarking.plot import write_plot
from blip2x.tasks.benchmarking.tables import curves_table, operations, parts_table, rates_table, title

FILE, PAGE, PLOT = "benchmark.json", "benchmark.md", "curves.png"


@TASKS.register("benchmark")
class Benchmark:
    """All figures are in benchmark.json, tables in benchmark.md; the rates and each part's seconds in results.json, too."""

    computes: ClassVar[bool] = True

    def __init__(self, cfg: RunConfig, run: Run):
        self.cfg, self.run_folder, self.context = cfg, run, run.context
        self.task: BenchmarkConfig = cfg.task

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise `UserError` where something cannot be measured."""
        if cfg.dataset.cache is Cache.features and not cfg.task.data:
            raise UserError("dataset.cache=features keeps what comes of a data set's pictures; set task.data=true")
        check_overrides(cfg.task)
        ranks = Layout.of(cfg, started_processes()).data_ranks
        for name in cfg.task.of:
            check_job(job_of(cfg.task, name, ranks), ranks)
        made_up = _made_up(cfg.task)
        for size, name, values in planned(made_up):
            for value in values:
                check_job(job_of(made_up, name, ranks, **{size: value}), ranks)

    def run(self) -> TaskResult:
        """Measure the tasks one after the other."""
        run, context = self.run_folder, self.context
        context.barrier()
        peak = max(context.gather_objects(matrix_peak(self.task.matmul_sizes, self.cfg.precision, context.device)))
        run.console.print(f"matrix peak of a rank: {operations(peak)} per second", markup=False, highlight=False)
        command = context.on_main((run.root / "command.txt").read_text).splitlines()[-1]
        results: list[Measured] = []
        for name in self.task.of:
            results.append(self._measure(job_of(self.task, name, context.data_size), peak))
            if context.is_main:
                self._write(command, peak, results, [])  # what comes next may fail
                run.console.print(title(results[-1]), style="bold", markup=False, highlight=False)
                run.console.print(parts_table(results[-1]))
        if context.is_main:
            run.console.print(rates_table(results))
        curves = self._curves(peak) if self.task.curves else []
        if curves and context.is_main:
            self._write(command, peak, results, curves)
            run.console.print(curves_table(curves))
            write_plot(curves, run.path(PLOT))
        stages = {found.job.name: found.metrics() for found in results}
        for curve in curves:
            where, name = (OPERATIONS, curve.of) if curve.size == OPERATIONS else (curve.of, curve.size)
            stages.setdefault(where, {})[f"{name}_exponent"] = curve.exponent
        return TaskResult(stages=stages)

    def _measure(self, job: Job, peak: float) -> Measured:
        with ProgressBar(self.run_folder.console, job.name, steps_of(job), unit="images") as bar:
            return self._measured(job, peak, bar.advance)

    def _curves(self, peak: float) -> list[Curve]:
        task, curves = _made_up(self.task), []
        for size, name, values in planned(task):
            jobs = [job_of(task, name, self.context.data_size, **{size: value}) for value in values]
            total = sum(steps_of(job, timers=False) for job in jobs)
            with ProgressBar(self.run_folder.console, f"{name} by {size}", total, unit="images") as bar:
                found = [self._measured(job, peak, bar.advance, timers=False) for job in jobs]
            expected = exponent(values, [sum(each.flops.values()) for each in found])
            medians, fastest = [each.step.median for each in found], [each.step.min for each in found]
            curves.append(Curve(size, name, values, medians, fastest, expected))
        if OPERATIONS in task.curves and self.context.is_main:
            total = len(GROWTHS) * len(task.sizes.operations) * task.repeats
            with ProgressBar(self.run_folder.console, OPERATIONS, total, unit="operations") as bar:
                curves += grown_operations(task, lambda: bar.advance(1))
        return curves

    def _measured(self, job: Job, peak: float, advance: Callable[[int], None], *, timers: bool = True) -> Measured:
        run = _quiet(self.run_folder)
        seed_everything(self.cfg.seed, 0)  # the same weights on all ranks
        try:
            return measure(job, run, lambda job: build(job, run), peak=peak, advance=advance, timers=timers)
        finally:
            gc.collect()  # a model's layers know each other
            self.context.on_main(lambda: shutil.rmtree(run.folder, ignore_errors=True))

    def _write(self, command: str, peak: float, results: Sequence[Measured], curves: Sequence[Curve]) -> None:
        """On the main rank, alone."""
        record: dict[str, Any] = {
            "hardware": hardware(self.context),
            "versions": versions(),
            "command": command,
            "device": self.context.device,
            "ranks": self.context.world_size,
            "parallelism": self.cfg.parallelism.kind,
            "precision": self.cfg.precision.name.value,
            "matrix_peak": peak,
            "tasks": {found.job.name: found.record() for found in results},
            "curves": [curve.record() for curve in curves],
        }
        self.run_folder.write_json(record, FILE)
        write_whole(self.run_folder.path(PAGE), page(record, results, curves, PLOT))


def _made_up(task: BenchmarkConfig) -> BenchmarkConfig:
    """For curves: of a data set's pictures and texts the sizes cannot be chosen."""
    return replace(task, data=False)


def _quiet(run: Run) -> Run:
    """For a task inside: a folder that is removed afterwards, and a console that nobody reads."""
    folder = run.path("scratch", "x").parent
    return Run(folder, folder, run.stage, run.context, Console(file=io.StringIO(), width=10_000, color_system=None), Loggers())
