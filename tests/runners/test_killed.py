"""A training that is killed with no chance to clean up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2x.config.compose import compose_config
from blip2x.data.sources.digits import Digits
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.models.weights.checkpoint import load_checkpoint
from blip2x.models.weights.manifest import read_manifest
from blip2x.registry import VISION_ENCODERS
from blip2x.tasks.common.launch import launch

ROOT = Path(__file__).parents[2]
SECONDS = 120
COMMAND = [
    "task=pretrain_vision", "task.batch_size=4", "task.max_epochs=null", "task.save_every=1", "task.log_every=1",
    "task.eval_batch_size=2", "dataset.train_scenes=8", "dataset.test_scenes=2", "dataset.held_out_combinations=0",
    "optim.warmup_steps=0", "run_name=r",
]  # fmt: skip


def wait_for_steps(count: int, metrics: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + SECONDS
    while not metrics.is_file() or metrics.read_text().count('"loss"') < count:
        assert process.poll() is None and time.monotonic() < end, f"no {count} steps in {metrics}"
        time.sleep(0.02)


@pytest.mark.timeout(300)
def test_its_checkpoint_is_whole_and_the_run_can_be_repeated(tmp_path):
    command = [*COMMAND, f"paths.outputs={tmp_path}"]
    checkpoint = tmp_path / "r/checkpoint"
    with (tmp_path / "output.txt").open("w") as output:
        words = [sys.executable, "runners/run.py", *command, "task.max_steps=1000000", "threads=1"]
        process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_for_steps(4, tmp_path / "r/metrics.jsonl", process)
            time.sleep(random.uniform(0, 0.3))  # anywhere in a step, much of which is saving
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    assert (tmp_path / "output.txt").read_text().count("Traceback") == 0
    if checkpoint.exists():  # between two renames there is none
        cfg = compose_config(command)
        vision = VISION_ENCODERS.get(cfg.model.vision.kind)(cfg.model.vision)
        load_checkpoint(checkpoint, PatchClassifier(vision, Digits(cfg.dataset).label_classes))
        assert read_manifest(checkpoint)["step"] >= 3

    results = launch(compose_config([*command, "task.max_steps=2", "overwrite=true"]), ["x"])
    assert results["pretrain_vision"].keys() == {"digit_accuracy", "colour_accuracy"}
    assert read_manifest(checkpoint)["step"] == 2
    assert not list((tmp_path / "r").glob(".*"))  # nothing half-written is left
