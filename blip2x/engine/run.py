"""The folder of a run and everything that is written about it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from blip2x.config.run import RunConfig
from blip2x.engine.folders import append_whole, claim_folder, require_space, write_whole
from blip2x.engine.resume import AUTO, may_go_on
from blip2x.engine.versions import versions
from blip2x.errors import UserError
from blip2x.parallel.context import Context
from blip2x.registry import LOGGERS

METRICS_FILE = "metrics.jsonl"
_FILE_WIDTH = 120  # columns


class Run:
    """A run folder, or a stage's folder inside it, with the writers that all stages share.

    Every rank has one; only rank 0's writes or prints.
    """

    def __init__(
        self, folder: Path, root: Path, stage: str, context: Context, console: Console, logger: Any, *, goes_on: bool = False
    ):
        self.folder = folder
        self.root = root  # the whole run's folder, where metrics.jsonl is
        self.stage = stage  # in metrics and predictions: the task's kind, or the name of a pipeline's stage
        self.context = context
        self.console = console
        self.goes_on = goes_on  # the folder is of a run that was interrupted
        self._logger = logger

    @classmethod
    def create(cls, cfg: RunConfig, context: Context, command: list[str], console: Console | None = None) -> Run:
        """Make ``<paths.outputs>/<run_name>`` with config.yaml, command.txt and versions.json; with resume=auto, go on in it.

        Args:
            cfg: the whole config; what it resolves to is written.
            context: the ranks of this run.
            command: the words that were typed.
            console: where to print; None: the terminal.

        Raises:
            UserError: the folder exists and neither `cfg.overwrite` nor `cfg.resume` says what to do about it, is of a run with
                another config, cannot be made, or the disk is full. On every rank.
        """
        config = cfg if OmegaConf.is_config(cfg) else OmegaConf.structured(cfg)

        def make() -> tuple[Path, bool]:
            outputs = Path(cfg.paths.outputs)
            require_space(outputs)
            if cfg.resume == AUTO and may_go_on(outputs / cfg.run_name, config):
                with (outputs / cfg.run_name / "command.txt").open("a", encoding="utf-8") as file:
                    file.write(shlex.join(command) + "\n")
                return outputs / cfg.run_name, True
            auto = f"{cfg.task.kind}-{cfg.model.name}-{cfg.dataset.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            folder = claim_folder(outputs, cfg.run_name, auto_name=auto, overwrite=cfg.overwrite)
            (folder / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
            (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
            write_whole(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))  # last: with it, it is a run's folder
            return folder, False

        folder, goes_on = context.on_main(make)
        console = (console or _terminal()) if context.is_main else Console(quiet=True)
        kind = cfg.logger.kind if context.is_main else "none"
        logger = LOGGERS.get(kind)(
            cfg.logger,
            folder=folder,
            name=folder.name,
            config=OmegaConf.to_container(config, resolve=True, enum_to_str=True),
            warn=lambda text: console.print(f"warning: {text}", style="yellow", markup=False),
        )
        return cls(folder, folder, cfg.task.kind, context, console, logger, goes_on=goes_on)

    def child(self, stage: str) -> Run:
        """The run of one stage: a folder of its own, the same metrics.jsonl, console and logger.

        Raises:
            UserError: another stage of this run has that name already.
        """

        def make() -> None:
            try:
                (self.folder / stage).mkdir(exist_ok=self.goes_on)
            except FileExistsError:
                raise UserError(f"two stages of this run are called {stage!r}; give one of them another name") from None

        self.context.on_main(make)
        return Run(self.folder / stage, self.root, stage, self.context, self.console, self._logger, goes_on=self.goes_on)

    @property
    def starts(self) -> int:
        """How many commands have worked on the whole run; on rank 0."""
        return len((self.root / "command.txt").read_text(encoding="utf-8").splitlines())

    def begin_training(self, objective: Any) -> bool:
        """Told what is about to be trained; gives whether the training is to leave checkpoints."""
        return True

    def path(self, *parts: str) -> Path:
        """A path inside this run's folder; the folders above it are made."""
        path = self.folder.joinpath(*parts)
        if self.context.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log_metrics(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Append one line {"stage", "step", ...metrics} to metrics.jsonl and tell the logger."""
        if not self.context.is_main:
            return
        line = json.dumps({"stage": stage, "step": step, **metrics}) + "\n"
        try:
            append_whole(self.root / METRICS_FILE, line)
        except OSError as error:  # no reason to lose the run
            self.console.print(f"warning: {METRICS_FILE} lacks a line: {error}", style="yellow", markup=False)
        self._logger.log(stage, step, metrics)

    def forget_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Leave lines of this stage out of metrics.jsonl, but those that `keep` wants: what is made anew has its own."""
        path = self.root / METRICS_FILE
        if not self.context.is_main or not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the run was killed while it wrote
                continue
            if row["stage"] != self.stage or keep(row):
                kept.append(line + "\n")
        write_whole(path, "".join(kept))

    def read_json(self, *parts: str) -> Any:
        """What `write_json` wrote to a file of this run's folder; None where there is none."""
        path = self.folder.joinpath(*parts)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_json(self, value: Any, *parts: str) -> Path:
        """Write `value` to a file in this run's folder; whoever reads it sees the old content or the new, never half."""
        return self._write(json.dumps(value, indent=2, ensure_ascii=False) + "\n", parts)

    def write_lines(self, rows: list[dict[str, Any]], *parts: str) -> Path:
        """Write `rows` to a .jsonl file in this run's folder, one per line; never half of it under the final name."""
        return self._write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), parts)

    def _write(self, text: str, parts: tuple[str, ...]) -> Path:
        path = self.path(*parts)
        if self.context.is_main:
            write_whole(path, text)
        return path

    def close(self) -> None:
        """Close the logger; call it on the run that `create` made."""
        self._logger.close()


def _terminal() -> Console:
    """The terminal, or, where output goes to a file or a pipe, lines wide enough for the results table."""
    console = Console()
    return console if console.is_terminal else Console(width=_FILE_WIDTH)
