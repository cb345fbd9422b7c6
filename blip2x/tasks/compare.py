"""Runs beside one another: what differed, what came out, which is best; see docs/compare.md."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import ClassVar

from blip2x.config.run import RunConfig
from blip2x.engine.compare import Comparison, find_runs
from blip2x.engine.compared.runs import is_run
from blip2x.engine.result import TaskResult
from blip2x.registry import TASKS
from blip2x.tasks.common.task import Task


@TASKS.register("compare")
class Compare(Task):
    """comparison.html, .csv and .json are in this run's folder, and, where one folder of runs is compared, in that as well."""

    shows_pictures: ClassVar[bool] = False
    computes: ClassVar[bool] = False

    @classmethod
    def check(cls, cfg: RunConfig, promised: Set[str] = frozenset()) -> None:
        """Raise `UserError` where there is no run to compare."""
        find_runs(cfg.runs)

    def run(self) -> TaskResult:
        """Compare; how many runs there are, and how many came to their end, is the result."""
        comparison = Comparison.of(find_runs(self.cfg.runs, self.console))
        comparison.print(self.console)
        page = comparison.write(self.run_folder.folder)
        beside = Path(self.cfg.runs[0]).expanduser()
        if len(self.cfg.runs) == 1 and beside.is_dir() and not is_run(beside):
            try:
                page = comparison.write(beside)
            except OSError as error:  # somebody else's runs
                self._say(f"warning: {beside} takes no copy of the comparison: {error.strerror or error}")
        self._say(f"comparison: {page}")
        return TaskResult({"runs": len(comparison.runs), "complete": sum(run.complete for run in comparison.runs)})

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
