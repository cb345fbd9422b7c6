"""A check-up of any task before hours are spent on it; see docs/doctor.md for what each line means."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from textwrap import shorten
from typing import Any, ClassVar

from rich.rule import Rule

from blip2x.config.run import RunConfig
from blip2x.config.tools import DoctorConfig
from blip2x.data.audit.verdicts import Verdict
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.registry import TASKS
from blip2x.tasks.checkup.data import check_data
from blip2x.tasks.checkup.examined import Examined, examined_of, layout_of, looked_at
from blip2x.tasks.checkup.findings import Findings, sentence
from blip2x.tasks.checkup.machine import MACHINE, check_devices, check_disk, check_versions
from blip2x.tasks.checkup.memory import check_memory
from blip2x.tasks.checkup.parameters import check_parameters
from blip2x.tasks.checkup.plan import check_plan
from blip2x.tasks.checkup.schedule import check_schedule
from blip2x.tasks.checkup.settings import check_settings
from blip2x.tasks.checkup.texts import check_prompts, check_tokenizers
from blip2x.tasks.checkup.trial import check_start, check_trial

TRACES_FILE = "traces.txt"


@TASKS.register("doctor")
class Doctor:
    """All lines are in doctor.json; memory.json and memory.md have what a training's memory consists of."""

    computes: ClassVar[bool] = False

    def __init__(self, cfg: RunConfig, run: Run):
        self.run_folder = run
        self.task: DoctorConfig = cfg.task
        self.found: list[Findings] = []

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise `UserError` where the config of what is looked at is wrong, or not for so many ranks."""
        for wanted in looked_at(cfg.task).values():
            layout_of(wanted.cfg, cfg.task)

    def run(self) -> TaskResult:
        """Look at everything; how many lines have which verdict is the result, beside each training's memory.

        Raises:
            UserError: something is broken, once all is written.
        """
        self.run_folder.path(TRACES_FILE).unlink(missing_ok=True)  # of a check-up before, in the same run folder
        tasks = examined_of(self.task, self.run_folder)
        for examined in tasks:
            self._title(examined.name)
            self._look_at(examined)
        self._title(MACHINE)
        self._try("versions", MACHINE, check_versions)
        self._try("devices", MACHINE, lambda: check_devices(tasks))
        self._try("disk", MACHINE, lambda: check_disk(tasks))
        return self._result()

    def _look_at(self, examined: Examined) -> None:
        name = examined.name
        self._try("config", name, lambda: check_settings(examined))
        start = self._try("start", name, lambda: check_start(examined))
        self._try("data", name, lambda: check_data(examined))
        if examined.stage:
            self._try("tokenizers", name, lambda: check_tokenizers(examined))
            self._try("prompts", name, lambda: check_prompts(examined))
            self._try("parameters", name, lambda: check_parameters(examined))
            self._try("memory", name, lambda: check_memory(examined))
        if examined.trains:
            schedule = self._try("schedule", name, lambda: check_schedule(examined)).record.get("schedule", {})
            if self.task.plan_on:
                steps = schedule.get("total_steps")
                self._try("plan", name, lambda: check_plan(examined, self.task.plan_on, steps))
        self._write()  # a trial may end the whole process, for lack of memory
        lacks = start.record.get("lacks", [])
        self._try("trial", name, lambda: check_trial(examined, self.task.steps, lacks))

    def _title(self, name: str) -> None:
        self.run_folder.console.print(Rule(name, align="left"))

    def _try(self, check: str, where: str, look: Callable[[], Findings]) -> Findings:
        """What a check finds; one that fails is a line like others, and stops nothing."""
        try:
            found = look()
        except UserError as error:
            found = Findings(where)
            found.broken(check, sentence(error))
        except Exception as error:
            found = Findings(where)
            found.broken(
                check, f"{type(error).__name__}: {sentence(error)}", f"{TRACES_FILE} has the traceback; please report it"
            )
            with self.run_folder.path(TRACES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{where}, {check}\n{traceback.format_exc()}\n")
        self.found.append(found)
        found.show(self.run_folder.console)
        return found

    def _write(self) -> tuple[list[dict[str, Any]], dict[str, dict]]:
        """Write doctor.json; (its lines, the records by what was looked at)."""
        lines = [{**vars(line), "verdict": line.verdict.value} for found in self.found for line in found.lines]
        records: dict[str, dict] = {}
        for found in self.found:
            records.setdefault(found.where, {}).update(found.record)
        self.run_folder.write_json({"lines": lines, "found": records}, "doctor.json")
        return lines, records

    def _result(self) -> TaskResult:
        lines, records = self._write()
        memory = {where: record["memory"] for where, record in records.items() if "memory" in record}
        if memory:
            self.run_folder.write_json(memory, "memory.json")
            pages = [found.page for found in self.found if found.page]
            self.run_folder.path("memory.md").write_text("\n".join(pages), encoding="utf-8")
        counts = Counter(line["verdict"] for line in lines)
        self.run_folder.console.print(
            f"{', '.join(f'{counts[verdict.value]} {verdict.value}' for verdict in Verdict)}; all lines are in doctor.json",
            style="bold",
            highlight=False,
        )
        if counts[Verdict.broken.value]:
            first = next(line for line in lines if line["verdict"] == Verdict.broken.value)
            raise UserError(
                f"{counts[Verdict.broken.value]} of {len(lines)} lines of the check-up are broken, first {first['where']}, "
                f"{first['check']}: {shorten(first['found'], 300)}; see {self.run_folder.folder / 'doctor.json'}"
            )
        results = {}
        for where in records:
            own = Counter(line["verdict"] for line in lines if line["where"] == where)
            results[where] = {verdict.value: own[verdict.value] for verdict in Verdict}
            if where in memory:
                results[where]["predicted_gib"] = round(memory[where]["peak"] / 2**30, 3)
                if memory[where]["free"] is not None:
                    results[where]["free_gib"] = round(memory[where]["free"] / 2**30, 3)
        return TaskResult(stages=results)
