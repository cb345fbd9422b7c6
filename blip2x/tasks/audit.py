"""What is wrong with a data set, before anything is trained on it; see docs/audit.md for what each check means."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Set
from typing import Any, ClassVar

from rich import box
from rich.table import Table
from rich.text import Text

from blip2x.config.run import RunConfig
from blip2x.data.audit.alike import MOST_NEAR
from blip2x.data.audit.page import audit_page
from blip2x.data.audit.survey import Settings, survey
from blip2x.data.audit.verdicts import Line, Verdict, judge
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.folders import write_whole
from blip2x.engine.progress import ProgressBar
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.registry import TASKS
from blip2x.tasks.checkup.findings import STYLES
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.task import Task

ALL = "all"
_WIDE = 120  # columns of a terminal; a narrower one gets lines


@TASKS.register("audit")
class Audit(Task):
    """Figures are in audit.json, the page is audit.html; bad_images.txt names every missing and every broken image."""

    shows_pictures: ClassVar[bool] = False
    computes: ClassVar[bool] = False

    @classmethod
    def check(cls, cfg: RunConfig, promised: Set[str] = frozenset()) -> None:
        """Raise `UserError` where a setting is out of range."""
        super().check(cfg, promised)
        task, wanted = cfg.task, cfg.task.open_images
        if wanted != ALL and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 0):
            raise UserError(f"task.open_images must be {ALL} or a number of images (0: none), got {wanted}")
        if not 0 <= task.near <= MOST_NEAR:
            raise UserError(f"task.near must be from 0 to {MOST_NEAR} bits, got {task.near}")
        if task.max_txt_len < 3:
            raise UserError(f"task.max_txt_len must be at least 3 tokens (a first one, a word, an end), got {task.max_txt_len}")
        if task.sheet < 0:
            raise UserError(f"task.sheet must be 0 or more pictures, got {task.sheet}")

    def run(self) -> TaskResult:
        """Look; how many checks ended how, and the numbers of images, are the result."""
        started = time.perf_counter()
        settings = Settings(
            open_images=None if self.task.open_images == ALL else self.task.open_images,
            near=self.task.near,
            max_txt_len=self.task.max_txt_len,
            sheet=self.task.sheet,
            processes=self.cfg.dataset.num_workers,
            seed=self.cfg.seed,
            tokenizers=self._tokenizers(),
            progress=lambda description, steps, unit: ProgressBar(self.console, description, steps, unit=unit),
            say=self._say,
        )
        bad_images = self.run_folder.path("bad_images.txt")
        with bad_images.open("w", encoding="utf-8") as file:
            found = survey(self.source, settings, file)
        lines = judge(found.figures)
        verdicts = [{**vars(line), "verdict": line.verdict.value} for line in lines]
        self.run_folder.write_json({**found.figures, "verdicts": verdicts}, "audit.json")
        page = self.run_folder.path("audit.html")
        opened = self.task.open_images if self.task.open_images == ALL else f"{self.task.open_images} of each split"
        facts = {
            "Finished": time.strftime("%Y-%m-%d %H:%M"),
            "Time": f"{time.perf_counter() - started:.0f} s",
            "Images opened": str(opened),
            "Near duplicates": f"at most {self.task.near} of 64 bits apart",
            "Tokens of": ", ".join(settings.tokenizers) or "no tokenizer on the disk",
        }
        write_whole(page, audit_page(found, lines, facts))
        self._show(lines)
        self._say(f"audit: {page}")
        return TaskResult(_metrics(found.figures, lines))

    def _tokenizers(self) -> dict[str, TextTokenizer]:
        """The model's, as far as they are here. One that would be made of the data set's words need not know them to count."""
        loader = ModelLoader(self.weights(self.cfg, frozenset()), texts=list, say=self._say)
        found = {}
        for part, title in (("qformer", "Q-Former"), ("language", "language model")):
            tokenizer = loader.own_tokenizer(part, fetch=getattr(self.cfg.model, part).tokenizer == "dataset")
            if tokenizer:
                found[title] = tokenizer
        return found

    def _show(self, lines: list[Line]) -> None:
        if self.console.is_terminal and self.console.width < _WIDE:
            for line in lines:
                advice = f": {line.advice}" if line.advice else ""
                self._say(f"{line.verdict.value}: {line.where}, {line.check}: {line.found}{advice}")
            return
        table = Table(title="Verdicts", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("where", "check", "verdict", "found", "what to do"):
            table.add_column(column, no_wrap=column == "verdict")
        for line in lines:
            verdict = Text(line.verdict.value, style=STYLES[line.verdict])
            table.add_row(Text(line.where), Text(line.check), verdict, Text(line.found), Text(line.advice))
        self.console.print(table)

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _metrics(figures: dict[str, Any], lines: list[Line]) -> dict[str, float]:
    counts = Counter(line.verdict for line in lines)
    metrics: dict[str, float] = {verdict.value: counts[verdict] for verdict in Verdict}
    images = [found["images"] for found in figures["splits"].values()]
    metrics["images"] = sum(each["count"] for each in images)
    metrics["missing_images"] = sum(each["missing"]["count"] for each in images)
    metrics["broken_images"] = sum(each["broken"]["count"] for each in images)
    return metrics
