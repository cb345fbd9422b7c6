"""Weights & Biases, imported only where it is chosen. Nothing asks, and whatever waits for the server waits a bounded time.

All stages of a run are in one W&B run, each metric as ``<stage>/<name>`` over ``<stage>/step``; what a run ends with is in its
summary as ``results/...``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from PIL import Image

from blip2x.config.logger import WandbConfig
from blip2x.engine.comparisons import HIGHER, LOWER, direction
from blip2x.engine.folders import write_whole
from blip2x.engine.loggers import Row, reason
from blip2x.engine.loggers._names import flat
from blip2x.engine.loggers._secrets import Secrets
from blip2x.engine.loggers._table import make_table
from blip2x.engine.run_files import TIMES
from blip2x.engine.versions import versions
from blip2x.registry import LOGGERS

ID_FILE = "wandb_id.txt"  # in the run's folder: with it an interrupted run goes on as the same W&B run
_SUMMARIES = {HIGHER: "max", LOWER: "min"}  # what stands for a run's metric, where that is not the latest value
_HURRIED_SECONDS = 1.0  # for the end of a W&B run that nobody wants to wait for
_SWEEPS = "sweeps"  # the folder of all sweeps, each of which is a folder of runs


class Worker:
    """Does one thing after the other in a thread of its own, so that a training never waits for what waits for a server."""

    def __init__(self) -> None:
        self._actions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._error: Exception | None = None
        self.is_over = False  # what fails now is not worth a word
        self._thread = Thread(target=self._work, name="wandb-worker", daemon=True)
        self._thread.start()

    def do(self, action: Callable[[], None]) -> None:
        """Have it done later; raise what an earlier action has raised, after which none is done."""
        if self._error:
            raise self._error
        self._actions.put(action)

    def close(self, seconds: float) -> bool:
        """Wait until all is done, but no longer than this, and give whether it is; raise what an action has raised."""
        self._actions.put(None)
        self._thread.join(seconds)
        self.is_over = True
        if self._error:
            raise self._error
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (action := self._actions.get()) is not None and not self.is_over:
            try:
                action()
            except Exception as error:  # told to whoever comes next
                self._error = error
                return


class WandbLogger:
    """One W&B run.

    Args:
        wandb: the module.
        run: what `wandb.init` gave.
        cfg: its config.
        hide: takes secrets out of texts.
        say: prints a line.
    """

    def __init__(self, wandb: Any, run: Any, cfg: WandbConfig, hide: Secrets, say: Callable[[str], None]):
        self._wandb, self._run, self._cfg, self._secrets, self._say = wandb, run, cfg, hide, say
        self._defined: set[str] = set()
        self._lost_tables = False
        self._worker = Worker()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log `metrics` over the stage's own steps (W&B's own step may not start again at 0)."""
        self._worker.do(lambda: self._log(stage, step, metrics))

    def table(self, stage: str, step: int, name: str, rows: Sequence[Row], folder: Path) -> None:
        """Log a table with pictures, for which W&B asks its server something and waits; without an answer it is left out."""
        if not self._cfg.rows:
            return
        table = make_table(rows, folder, self._cfg.rows, self._secrets.text)

        def send() -> None:
            data = [[self._wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in table.rows]
            made = self._wandb.Table(columns=table.columns, data=data, allow_mixed_types=True)
            try:
                self._log(stage, step, {name: made})
            except Exception as error:  # wandb's errors have no common base; the next table may find the server well
                if not self._lost_tables and not self._worker.is_over:
                    self._say(f"warning: Weights & Biases lacks the table {stage}/{name} of step {step} ({reason(error)})")
                self._lost_tables = True

        self._worker.do(send)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Put the results into the summary, by which W&B compares runs; they do not replace the best values of validations."""
        self._worker.do(lambda: self._run.summary.update(flat(results, "results/")))

    def close(self, failed: bool) -> None:
        """Send what is left, and end the W&B run whatever has happened: `wandb.init` gives the next one that is open.

        Raises:
            RuntimeError: the server did not take all of it in time; what it lacks is in the run's folder.
            Exception: what an earlier call has come to.
        """
        seconds, sync_dir = self._cfg.finish_seconds, self._run.settings.sync_dir
        error, is_written = None, False
        try:
            try:
                is_written = self._worker.close(seconds)
            except Exception as earlier:
                error = earlier
            except BaseException:  # Ctrl-C; only of a run whose end has begun does the teardown not wait without limit
                ending = Worker()
                ending.do(lambda: self._run.finish(exit_code=int(failed)))
                ending.close(_HURRIED_SECONDS)
                raise
            try:
                self._run.finish(exit_code=int(failed))
            except TimeoutError:
                is_written = False
        finally:
            # else its process may hold this run's id for a while, and the run could not be gone on with
            self._wandb.teardown()
        if error:
            raise error
        if not is_written:
            raise RuntimeError(
                f"the server did not take everything within {seconds:g} s; send it later: "
                f"wandb sync --include-online {sync_dir}"
            )

    def _log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        for name in values:
            self._define(stage, name)
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def _define(self, stage: str, name: str) -> None:
        """Say how a metric is drawn and which of its values stands for the run, when it first comes."""
        key, step = f"{stage}/{name}", f"{stage}/step"
        if key in self._defined:
            return
        if step not in self._defined:
            self._run.define_metric(step, hidden=True)
        summary = None if name in TIMES else _SUMMARIES.get(direction(name))  # the least time so far is no run's
        self._run.define_metric(key, step_metric=step, summary=summary)
        self._defined |= {key, step}


@LOGGERS.register("wandb")
def build(cfg: WandbConfig, *, folder: Path, config: dict[str, Any], goes_on: bool, say: Callable[[str], None]) -> WandbLogger:
    """Start a W&B run that keeps its files in `folder`, or go on with the one that was started there.

    It is kept offline where `cfg.mode` says so, where there is no key, and where the server does not answer in time.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it waits for the server where that hangs
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / "data")  # pictures of tables, until they are sent; else in the home
    import wandb

    hide, run_id = Secrets(), _run_id(folder, goes_on)
    named = {
        "project": cfg.project,
        "entity": cfg.entity,
        "id": run_id,
        "resume": "allow",
        "name": folder.name,
        "group": cfg.group or (folder.parent.name if folder.parent.parent.name == _SWEEPS else None),
        "job_type": cfg.job_type or config["task"]["kind"],
        "tags": hide.clean(list(cfg.tags)),
        "notes": cfg.notes and hide.text(cfg.notes),
        "dir": str(folder),
        "config": hide.clean({**config, "versions": versions()}),
    }

    def start(mode: str) -> WandbLogger:
        settings = wandb.Settings(
            silent=True,
            console="off",
            reinit="finish_previous",  # never another run's that is still open
            init_timeout=cfg.start_seconds,
            finish_timeout=cfg.finish_seconds,
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=1.0,  # seconds of metrics that a kill costs; W&B's own are 15
            # the command's words and the remote's address may have credentials in them
            x_disable_meta=True,
            disable_git=True,
            disable_code=True,
        )
        return WandbLogger(wandb, wandb.init(mode=mode, settings=settings, **named), cfg, hide, say)

    later = f"later: wandb sync {folder}/wandb/offline-run-*"
    if cfg.mode != "offline":
        try:
            if wandb.login(prompt=False, verify=False):
                return start("online")
            why = "no key was found; `wandb login` saves one"
        except Exception as error:  # wandb's errors have no common base
            why = reason(error)
            wandb.teardown()  # else this run's id stays in use
        warning = "note: " if cfg.mode == "auto" and why.startswith("no key") else "warning: "
        say(f"{warning}Weights & Biases is kept offline ({why}); {later}")
    return start("offline")


def _run_id(folder: Path, goes_on: bool) -> str:
    path = folder / ID_FILE
    if goes_on and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    write_whole(path, run_id + "\n")
    return run_id
