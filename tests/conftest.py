"""Process settings for all tests, and the demo in small: a run folder as the default command leaves it behind."""

from __future__ import annotations

import functools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from blip2x.startup import prepare_process

# before anything imports paddle; tests that run side by side share the cores
prepare_process(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

os.environ["BLIP2X_CACHE"] = os.path.join(tempfile.gettempdir(), f"blip2x-tests-{os.getuid()}")  # keyed by file and time

FEW_SCENES = ["dataset.train_scenes=64", "dataset.test_scenes=12", "optim.warmup_steps=0"]
FEW_STEPS = ["task.batch_size=8", "task.max_steps=6", "task.max_epochs=null", "task.log_every=2"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draw the same random numbers whichever tests came before, in this process or another."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "paddle" in sys.modules:
        sys.modules["paddle"].seed(0)


class Scheduling(LoadScopeScheduling):
    """A file's tests go to one process, and so do all that start several: two of those at a time would fight for the cores."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "distributed" if file.startswith("tests/distributed/") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    """How files are dealt out where tests run side by side."""
    return Scheduling(config, log)


@dataclass(frozen=True)
class Demo:
    """A finished run of the whole default pipeline."""

    folder: Path
    command: tuple[str, ...]
    results: dict[str, Any]

    def checkpoint(self, stage: str) -> Path:
        return self.folder / stage / "checkpoint"


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Callable[..., Demo]:
    """`demo(*overrides)`: the default pipeline on 12 evaluation scenes, six steps per training; run once per session."""
    outputs = tmp_path_factory.mktemp("demo")

    @functools.cache
    def run(*overrides: str) -> Demo:
        from blip2x.config.compose import compose_config
        from blip2x.engine import memory
        from blip2x.tasks.common.launch import launch

        memory._jobs = 0  # as in a process of its own
        name = f"run{len(list(outputs.iterdir()))}"
        command = (*FEW_SCENES, *overrides, few_steps(), f"paths.outputs={outputs}", f"run_name={name}")
        return Demo(outputs / name, command, launch(compose_config([*command]), ["runners/run.py", *command]))

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, the one of the system; each test opens pages of its own with `browser.new_page()`.

    It lives for a file's tests only: loaders of other tests fork, and their workers would hold its pipes and never let it end.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=[*quiet, "--no-sandbox"])  # root has no sandbox
        yield chromium
        chromium.close()


def few_steps() -> str:
    """The override that shortens the default pipeline's stages and leaves them as they are otherwise."""
    from blip2x.config.compose import compose_config, quoted

    words = []
    for stage in compose_config([]).task.stages:
        own = [*stage.overrides, "task.eval_batch_size=5"]
        own += FEW_STEPS if stage.task.startswith("pretrain") else []
        own += ["task.contrast_steps=3"] if stage.task == "pretrain_stage1" else []
        keys = {"task": stage.task, "name": stage.name, "unless": stage.unless, "overrides": f"[{','.join(map(quoted, own))}]"}
        words.append(f"{{{','.join(f'{key}: {value}' for key, value in keys.items() if value is not None)}}}")
    return f"task.stages=[{','.join(words)}]"
