"""The only entry point: ``python runners/run.py task=caption model=opt2.7b``. Compose, check, dispatch."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from blip2x.config import load_config
from blip2x.config.compose import command_overrides, spelled
from blip2x.config.help import help_text
from blip2x.config.repeat import primary_config
from blip2x.config.sweep import claim_run_name, in_sweep, job_command, job_name
from blip2x.errors import Interrupted, UserError
from blip2x.parallel.launch_env import join_slurm
from blip2x.parallel.leave import leaving_quietly
from blip2x.parallel.lost_ranks import naming_lost_ranks
from blip2x.startup import prepare_process

failed: list[str] = []  # jobs of a sweep


def run_task(cfg: DictConfig) -> None:
    """Run one task; bad input is one sentence and exit code 2, of a sweep after its other jobs."""
    try:
        config = load_config(cfg, command_overrides())
        claim_run_name(config.run_name)
        join_slurm(os.environ, len(os.sched_getaffinity(0)))
        prepare_process(config.threads)
        from blip2x.engine.stop import stopping_at_once
        from blip2x.tasks.common.launch import launch  # imports paddle: not before, so that --help and --cfg are quick

        with stopping_at_once(), naming_lost_ranks():
            launch(config, job_command(sys.argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        # submitit gives each job of a sweep a process of its own, whose exit code is the job's
        if not in_sweep() or "SUBMITIT_EXECUTOR" in os.environ:
            raise SystemExit(2) from None
        failed.append(job_name())
    except Interrupted as stop:  # a sweep stops, too
        print(f"interrupted: {stop}", file=sys.stderr)
        raise SystemExit(Interrupted.EXIT_CODE) from None


def main() -> None:
    """Have Hydra compose what was typed, of conf/ or of the run that is to be repeated, and run the task."""
    try:
        name = primary_config(sys.argv[1:])
        sys.argv[1:] = spelled(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parents[1] / "conf"), config_name=name)(run_task)()


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(shutil.get_terminal_size((120, 40)).columns))
    else:
        with leaving_quietly():
            main()
            if failed:
                print(
                    f"error: {len(failed)} of this sweep's jobs did not run to the end:", *failed, sep="\n  ", file=sys.stderr
                )
                sys.exit(2)
