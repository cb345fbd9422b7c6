"""The only entry point: ``python runners/run.py task=caption model=opt2.7b``. Compose, check, dispatch."""

from __future__ import annotations

import os
import shutil
import sys
import traceback
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from blip2x.config import load_config
from blip2x.config.compose import command_overrides, composing_mistake, spelled
from blip2x.config.help import help_text
from blip2x.config.repeat import primary_config
from blip2x.config.run import RunConfig
from blip2x.config.sweep import in_sweep, job_command, require_plugins
from blip2x.engine.sweep_job import ending_sweep, mistake_of_search, run_job
from blip2x.errors import Interrupted, UserError
from blip2x.parallel.launch_env import join_slurm
from blip2x.parallel.leave import leaving_quietly
from blip2x.parallel.lost_ranks import naming_lost_ranks
from blip2x.startup import prepare_process


def run_task(cfg: DictConfig) -> float | None:
    """Run one task; bad input is one sentence and exit code 2, of a sweep after its other jobs. A search is given a number."""
    if in_sweep():
        return run_job(cfg, run)
    try:
        if any(word.startswith("sweep=") for word in command_overrides()):
            raise UserError(f"sweep={cfg.sweep} names a sweep, but this is one run: add -m, or name it by run_name")
        run(load_config(cfg, command_overrides()), None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        raise SystemExit(Interrupted.EXIT_CODE) from None
    return None


def run(config: RunConfig, threads: int | None) -> None:
    """Run the task of `config`; `threads` is what `config.threads` is where that is null."""
    join_slurm(os.environ, len(os.sched_getaffinity(0)))
    prepare_process(config.threads or threads)
    from blip2x.engine.stop import stopping_at_once
    from blip2x.tasks.common.launch import launch  # imports paddle: not before, so that --help and --cfg are quick

    with stopping_at_once(), naming_lost_ranks():
        launch(config, job_command(sys.argv))


def main() -> None:
    """Have Hydra compose what was typed, of conf/ or of the run that is to be repeated, and run the task."""
    try:
        name = primary_config(sys.argv[1:])
        sys.argv[1:] = spelled(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises what it would print otherwise, with exit code 1 whatever was wrong
    start = hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "conf"), config_name=name)
    try:
        start(run_task)()
    except Exception as error:
        if sentence := _mistake(error):
            print(f"error: {sentence}", file=sys.stderr)
            raise SystemExit(2) from None
        traceback.print_exc()
        raise SystemExit(1) from None


def _mistake(error: Exception) -> str | None:
    """What the user has to know, where `error` is of the command's words; None: it is a mistake of ours."""
    if isinstance(error, UserError):  # of a sweep
        return str(error)
    in_task = any(frame.f_code is run_task.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not in_task:
        return composing_mistake(error)
    return mistake_of_search(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 gets question marks and not an error
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(shutil.get_terminal_size((120, 40)).columns))
    else:
        try:
            require_plugins(sys.argv[1:])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        with leaving_quietly(), ending_sweep(sys.argv):
            main()
