"""The folder of a run and everything that is written about it."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import blip2x
from blip2x.config.compose import command_overrides, is_hydras_job
from blip2x.config.run import RunConfig
from blip2x.engine.folders import append_whole, check_name, claim_folder, hold, release, require_space, write_whole
from blip2x.engine.hardware import hardware
from blip2x.engine.loggers import METRICS_FILE, Loggers, Row, metric_lines
from blip2x.engine.progress import display_of
from blip2x.engine.resume import AUTO, may_go_on
from blip2x.engine.run_log import RunLog
from blip2x.engine.status import State, begin_status, end_status, read_status
from blip2x.engine.terminal import terminal
from blip2x.engine.versions import git_diff, versions
from blip2x.errors import Interrupted, UserError
from blip2x.parallel.context import Context

LOG_FILE = "log.txt"
RESULTS_FILE = "results.json"
PREDICTIONS_FILE = "predictions.jsonl"
_QUOTED = re.compile(r"""'[^']*'|"'\"""")  # what shlex.join quotes, and how it writes the quote itself; may have newlines
_NAMES = ("run_name", "sweep")
_SEARCHES = ("retrieved_texts", "retrieved_images")  # keys of what a search found for a picture, or for a text


class Run:
    """A run folder, or a stage's folder inside it, with the writers that all stages share.

    Every rank has one; only rank 0's writes or prints.
    """

    def __init__(
        self,
        folder: Path,
        root: Path,
        stage: str,
        context: Context,
        console: Console,
        loggers: Loggers,
        *,
        goes_on: bool = False,
        log: RunLog | None = None,
    ):
        self.folder = folder
        self.root = root  # the whole run's folder, where metrics.jsonl is
        self.stage = stage  # in metrics and predictions: the task's kind, or the name of a pipeline's stage
        self.context = context
        self.console = console
        self.goes_on = goes_on  # the folder is of a run that was interrupted
        self._loggers = loggers
        self._log = log  # of rank 0
        self._examples: Sequence[Row] = ()

    @classmethod
    def create(cls, cfg: RunConfig, context: Context, command: list[str], console: Console | None = None) -> Run:
        """Make ``<paths.outputs>/<run_name>`` with all that repeats the run; with resume=auto, go on in it.

        This process holds the folder until `close`, or its own end. From now on all that the console prints is in log.txt.

        Args:
            cfg: the whole config; what it resolves to is written.
            context: the ranks of this run.
            command: the words that were typed.
            console: where to print; None: the terminal.

        Raises:
            UserError: the folder exists and neither `cfg.overwrite` nor `cfg.resume` says what to do about it, has what the
                run needs, is of a run with another config or in the hands of another process, cannot be made, or the disk is
                full. On every rank.
        """
        config = cfg if OmegaConf.is_config(cfg) else OmegaConf.structured(cfg)

        def make() -> tuple[Path, bool]:
            outputs = Path(cfg.paths.outputs)
            require_space(outputs)
            if cfg.resume == AUTO and _goes_on(outputs, cfg.run_name, config):
                folder = outputs / cfg.run_name
                if not _is_complete(folder):
                    with _ended_by_errors(folder):
                        begin_status(folder)
                        if not _has_results(folder):
                            append_whole(folder / "command.txt", shlex.join(command) + "\n")
                return folder, True
            if cfg.overwrite and cfg.run_name:
                _require_apart(outputs / cfg.run_name, config)
            folder = claim_folder(outputs, cfg.run_name, auto_name=_auto_name(cfg), overwrite=cfg.overwrite)
            with _ended_by_errors(folder):
                _write_origin(folder, config, context, command)
            return folder, False

        folder, goes_on = context.on_main(make)
        if not context.is_main:
            return cls(folder, folder, cfg.task.kind, context, Console(quiet=True), Loggers(), goes_on=goes_on)
        console = console or terminal(quiet=cfg.quiet)
        if goes_on and _has_results(folder):  # nothing is to be logged any more
            return cls(folder, folder, cfg.task.kind, context, console, Loggers(), goes_on=True)
        log = RunLog(folder / LOG_FILE, console, shlex.join(command))
        with _ended_by_errors(folder, log):
            loggers = Loggers.build(
                cfg.logger,
                folder=folder,
                config=OmegaConf.to_container(config, resolve=True, enum_to_str=True),
                goes_on=goes_on,
                say=lambda text: console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
            )
        return cls(folder, folder, cfg.task.kind, context, console, loggers, goes_on=goes_on, log=log)

    def child(self, stage: str) -> Run:
        """The run of one stage: a folder of its own, the same metrics.jsonl, console and loggers.

        Raises:
            UserError: another stage of this run has that name already.
        """

        def make() -> None:
            try:
                (self.folder / stage).mkdir(exist_ok=self.goes_on)
            except FileExistsError:
                raise UserError(f"two stages of this run are called {stage!r}; give one of them another name") from None

        self.context.on_main(make)
        return Run(self.folder / stage, self.root, stage, self.context, self.console, self._loggers, goes_on=self.goes_on)

    @property
    def starts(self) -> int:
        """How many commands have worked on the whole run; on rank 0."""
        text = (self.root / "command.txt").read_text(encoding="utf-8")
        return _QUOTED.sub("", text).count("\n")

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
        """Append one line {"stage", "step", ...metrics} to metrics.jsonl and tell the loggers."""
        if not self.context.is_main:
            return
        line = json.dumps({"stage": stage, "step": step, **metrics}) + "\n"
        try:
            append_whole(self.root / METRICS_FILE, line)
        except OSError as error:  # no reason to lose the run
            self.console.print(f"warning: {METRICS_FILE} lacks a line: {error}", style="yellow", markup=False)
        self._loggers.log(stage, step, metrics)
        if self._examples:
            self._loggers.table(stage, step, "examples", self._examples, self.folder)
            self._examples = ()

    def show_examples(self, rows: Callable[[], Sequence[Row]]) -> None:
        """Give the loggers some of what a validation said, with the next line of metrics; see `Logger.table` for pictures.

        Args:
            rows: makes them; it is not called where nobody looks at them.
        """
        if self.context.is_main and len(self._loggers):
            self._examples = rows()

    def forget_metrics(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Leave lines of this stage out of metrics.jsonl, but those that `keep` wants: what is made anew has its own."""
        path = self.root / METRICS_FILE
        if not self.context.is_main or not path.is_file():
            return
        kept = (row for row in metric_lines(path) if row["stage"] != self.stage or keep(row))
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))

    def read_json(self, *parts: str) -> Any:
        """What `write_json` wrote to a file of this run's folder; None where there is none."""
        path = self.folder.joinpath(*parts)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_json(self, value: Any, *parts: str) -> Path:
        """Write `value` to a file in this run's folder; whoever reads it sees the old content or the new, never half."""
        return self._write(json.dumps(value, indent=2, ensure_ascii=False) + "\n", parts)

    def write_lines(self, rows: Sequence[Row], *parts: str) -> Path:
        """Write `rows` to a .jsonl file in this run's folder, one per line; never half of it under the final name."""
        return self._write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), parts)

    def write_predictions(self, rows: Sequence[Row]) -> Path:
        """Write `rows` to predictions.jsonl as `write_lines` does, and give them to the loggers, those of each kind apart."""
        path = self.write_lines(rows, PREDICTIONS_FILE)
        if self.context.is_main and len(self._loggers):
            kinds: dict[str, list[Row]] = {}
            for row in rows:
                kinds.setdefault(next((way for way in _SEARCHES if way in row), "predictions"), []).append(row)
            for name, own in kinds.items():
                self._loggers.table(self.stage, self._last_step(), name, own, self.folder)
        return path

    def _last_step(self) -> int:
        """Of this stage, where it has trained; in this process or in an earlier one that it goes on with."""
        lines = metric_lines(self.root / METRICS_FILE)
        return max((row["step"] for row in lines if row["stage"] == self.stage), default=0)

    def _write(self, text: str, parts: tuple[str, ...]) -> Path:
        path = self.path(*parts)
        if self.context.is_main:
            write_whole(path, text)
        return path

    def log_results(self, results: Mapping[str, Any]) -> None:
        """Tell the loggers what is in results.json."""
        self._loggers.finish(results)

    def log_line(self, text: str) -> None:
        """Write to log.txt what is printed elsewhere."""
        if self._log:
            self._log.write(f"{text}\n")

    def log_traceback(self, error: BaseException) -> None:
        """Write to log.txt where `error`, which ends the run, came from."""
        if self._log:
            self._log.traceback(error)

    def close(self, failed: bool = False) -> None:
        """End a live display that an error has left, close the loggers and log.txt, and let other processes have the folder.

        Call it on the run that `create` made, or enter that one by `with`.
        """
        display_of(self.console).end()  # of a loop in a generator, which ends only when nobody holds the error any more
        try:
            self._loggers.close(failed)
        except Interrupted:
            if failed:
                raise
            self.console.print("stopped waiting for the loggers", style="yellow")  # all else is done: the run is complete
        finally:
            if self._log:
                self._log.close()
            if self.context.is_main:
                release(self.root)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)


def _goes_on(outputs: Path, name: str, config: DictConfig) -> bool:
    """Whether there is a run of that name to go on with, which this process holds then."""
    check_name(name)
    folder = outputs / name
    if not folder.exists():
        return False
    hold(folder)
    goes_on = False
    try:
        goes_on = may_go_on(folder, config)
    finally:
        if not goes_on:
            release(folder)
    return goes_on


@contextmanager
def _ended_by_errors(folder: Path, log: RunLog | None = None) -> Iterator[None]:
    """Where the block raises, note it in `folder`, which is being made, and let others have it."""
    try:
        yield
    except BaseException as error:
        end_status(folder, error)
        if log:
            log.close()
        release(folder)
        raise


def _has_results(folder: Path) -> bool:
    """Whether the run of `folder` has come to its end; its report may be missing."""
    try:
        return "seconds" in json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _is_complete(folder: Path) -> bool:
    return _has_results(folder) and read_status(folder).get("state") == State.complete.value


def _require_apart(folder: Path, config: DictConfig) -> None:
    """Raise `UserError` where `folder`, which is to be replaced, has something that the run of `config` reads."""
    if not folder.is_dir():
        return
    for key, value in _strings(OmegaConf.to_container(config, resolve=True)):
        is_name = key in _NAMES or key.endswith((".kind", ".name"))  # and no path, although it may look like one
        if not is_name and Path(value).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"overwrite=true would delete {value}, which this run needs ({key}); choose another run_name")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a config, with their keys."""
    if isinstance(value, str) and value:
        yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, found in inner:
        yield from _strings(found, f"{key}.{name}".lstrip("."))


def _auto_name(cfg: RunConfig) -> str:
    if cfg.run:
        return re.sub(r"-repeat(-\d+)?$", "", Path(cfg.run).resolve().name) + "-repeat"
    return f"{cfg.task.kind}-{cfg.model.name}-{cfg.dataset.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _write_origin(folder: Path, config: DictConfig, context: Context, command: list[str]) -> None:
    """Write what the run comes from; config.yaml last, for with it the folder is a run's."""
    overrides = command_overrides() if is_hydras_job() else command[1:]
    (folder / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
    begin_status(folder)
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(overrides), encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
    (folder / "hardware.json").write_text(json.dumps(hardware(context), indent=2) + "\n", encoding="utf-8")
    diff = git_diff(Path(blip2x.__file__).parent)
    if diff:
        (folder / "diff.patch").write_bytes(diff)
    write_whole(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
