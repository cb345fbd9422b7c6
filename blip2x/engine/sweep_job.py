"""A sweep from its start over each job to its end; a job that fails, whatever of, leaves the others alone.

Launchers run jobs one after the other in this process (basic), in workers of it (joblib), or elsewhere (submitit), so that what
became of a job is in files (engine/sweep.py).
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from blip2x.config import load_config
from blip2x.config.compose import command_overrides, override_key
from blip2x.config.run import RunConfig
from blip2x.config.sweep import begin_sweep, claim_run_name, job_name, launcher, sweep_folder
from blip2x.engine import sweep
from blip2x.errors import Interrupted, UserError
from blip2x.parallel.launch_env import join_slurm

Run = Callable[[RunConfig, "int | None"], None]  # the task of a config, and the threads where it has none

_begun: list[DictConfig] = []  # the config of the sweep that this process has started
_stopped: list[str] = []  # signals: no further job is to be started by this process


class SweepStart(Callback):
    """Called by Hydra once per sweep, before its first job; conf/config.yaml names it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Fix what all jobs share; what is wrong with it is one sentence and exit code 2."""
        try:
            folder = begin_sweep(config)
            if config.sweep is None and _ranks() > 1:
                raise UserError("a sweep of several ranks needs a name that all of them know: give sweep=NAME")
        except UserError as error:  # Hydra would make a warning of it
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        _begun.append(config)
        if _is_main():
            for name in (sweep.FAILURES_FILE, sweep.SEARCH_FILE):  # of an earlier command
                (folder / name).unlink(missing_ok=True)
        if config.hydra.runtime.choices["hydra/sweeper"] == "optuna":
            from optuna.logging import WARNING, set_verbosity

            set_verbosity(WARNING)  # runs and the best of them are said here
        if config.hydra.runtime.choices["hydra/launcher"] == "joblib":  # its workers' runs get Ctrl-C as well, and save
            signal.signal(signal.SIGINT, _stop)


@contextmanager
def ending_sweep(command: Sequence[str]) -> Iterator[None]:
    """Behind the block, which runs `command`, compare the runs of the sweep that was started in it and list what failed.

    Exit codes: 2 where a job failed, 75 where the sweep was interrupted, 1 where a launcher broke down.
    """
    code: Any = 0
    try:
        yield
    except KeyboardInterrupt:
        if not _begun:
            raise
        code = Interrupted.EXIT_CODE
    except SystemExit as stop:
        if not _begun:
            raise
        code = stop.code
    if _begun:
        sys.exit(_end(_begun[-1], Interrupted.EXIT_CODE if _stopped else code, list(command)) if _is_main() else code)


def run_job(cfg: DictConfig, run: Run) -> float | None:
    """Run the job of `cfg` by `run`, unless its folder says that it is complete; give the objective of a search."""
    if _stopped:
        return None
    folder = sweep_folder() / job_name()
    try:
        config = load_config(cfg, command_overrides())
        folder = _folder(config, folder)
        todo = sweep.place(config, folder, is_main=_is_main())
    except UserError as error:
        if not (folder / sweep.CONFIG_FILE).is_file():  # what is there is another run's
            _record(folder, sweep.FAILED, str(error))
        _fail(folder, str(error))
        return cfg.objective_of_failed
    if not todo:
        print(f"{folder.name}: complete, passed over", flush=True)
    elif launcher() == "joblib":
        _run_in_child(config, folder, run)
    elif _run(config, folder, run, None) == sweep.INTERRUPTED and launcher() == "basic":
        raise SystemExit(Interrupted.EXIT_CODE)
    return _objective(config, folder)


def _folder(config: RunConfig, folder: Path) -> Path:
    if config.run_name is None:
        return folder
    claim_run_name(config.run_name)
    if Path(config.run_name).name != config.run_name:
        raise UserError(f"run_name={config.run_name} must be a plain folder name, without slashes")
    return folder.with_name(config.run_name)


def _objective(config: RunConfig, folder: Path) -> float | None:
    if config.objective is None:
        return None
    if sweep.state(folder) != sweep.COMPLETE:
        return config.objective_of_failed
    try:
        sweep.check_objective(folder, config.objective)
    except UserError as error:
        _fail(folder, str(error))
    value = sweep.objective(folder, config.objective)
    return config.objective_of_failed if value is None else value


def _run(config: RunConfig, folder: Path, run: Run, threads: int | None) -> str:
    """Run one job here; what becomes of it."""
    try:
        run(config, threads)
        return sweep.COMPLETE
    except UserError as error:
        state, why = sweep.FAILED, str(error)
    except Interrupted as stop:
        state, why = sweep.INTERRUPTED, str(stop).partition("; run_name=")[0]  # it is the sweep that is gone on with
    except Exception as error:
        traceback.print_exc()
        state, why = sweep.FAILED, f"{type(error).__name__}: {error}"
    _record(folder, state, why)
    _fail(folder, why)
    return state


def _run_in_child(config: RunConfig, folder: Path, run: Run) -> None:
    """Run one job in a process of its own: where the system ends it for want of memory, the worker and its sweep go on."""
    signal.signal(signal.SIGINT, _stop)  # the child saves; this process waits for it
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()  # quick and safe: paddle, whose threads no fork has, is not imported yet
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            state = _run(config, folder, run, _threads())
            code = Interrupted.EXIT_CODE if state == sweep.INTERRUPTED else 0
        except KeyboardInterrupt:  # before the run was ready to be stopped
            code = Interrupted.EXIT_CODE
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == Interrupted.EXIT_CODE:
        _stopped.append("the job before")
    elif code:
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = f"its process ended by {name}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
        _record(folder, sweep.FAILED, why)
        _fail(folder, why)


def _threads() -> int:
    """A job's share of the cores where several run side by side."""
    cores, jobs = len(os.sched_getaffinity(0)), int(HydraConfig.get().launcher.n_jobs)
    return max(1, cores // (jobs if jobs > 0 else max(1, cores + 1 + jobs)))


def _record(folder: Path, state: str, why: str) -> None:
    if _is_main():
        sweep.record(folder, state, why)


def _fail(folder: Path, why: str) -> None:
    print(f"error: {folder.name}: {why}", file=sys.stderr, flush=True)
    if _is_main():
        sweep.note_failure(folder, why)


def _end(config: DictConfig, code: Any, command: list[str]) -> Any:
    folder = Path(config.hydra.sweep.dir)
    again = shlex.join(["python", *command, *([] if _is_named(command) else [f"sweep={folder.name}"])])
    if code == Interrupted.EXIT_CODE:
        print(f"interrupted: the sweep {folder.name}; go on with it by\n  {again}", file=sys.stderr)
        return code
    try:
        sweep.compare(folder)
        if (folder / sweep.SEARCH_FILE).is_file():
            sweep.tell_best(folder, config.objective)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = code or 2
    failed = sweep.failures(folder)
    if failed:
        lines = [f"{name}: {why}" for name, why in failed.items()]
        print(f"error: {len(failed)} of this sweep's jobs did not run to the end:", *lines, sep="\n  ", file=sys.stderr)
        print(f"what is complete is passed over by\n  {again}", file=sys.stderr)
    return code or (2 if failed else 0)


def _is_named(command: list[str]) -> bool:
    return any(override_key(word) == "sweep" for word in command)


def _stop(number: int, frame: Any) -> None:
    """Start no further job; a second time, end at once."""
    if _stopped:
        raise KeyboardInterrupt
    _stopped.append(signal.Signals(number).name)


def _ranks() -> int:
    environ = dict(os.environ)
    join_slurm(environ, len(os.sched_getaffinity(0)))
    return int(environ.get("PADDLE_TRAINERS_NUM", "1"))


def _is_main() -> bool:
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"
