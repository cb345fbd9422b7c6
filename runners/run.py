"""The only entry point: ``python runners/run.py task=caption model=opt2.7b``. Compose, check, dispatch."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from blip2x.config import load_config
from blip2x.errors import UserError
from blip2x.registry import TASKS
from blip2x.startup import prepare_process


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parents[1] / "conf"), config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one task; bad input ends with one sentence and exit code 2."""
    try:
        config = load_config(cfg)
        prepare_process(config.threads)
        from blip2x.engine.run import open_run  # paddle is imported from here on, not for --help or --cfg

        with open_run(config) as run:
            run.finish(TASKS.get(config.task.kind)(config, run).run())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
