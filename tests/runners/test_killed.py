"""A training that is killed with no chance to clean up, again and again, ends as if it had been left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from blip2x.engine.run_files import TIMES

ROOT = Path(__file__).parents[2]
# Stage 1 with all its random numbers, a checkpoint in each step, an epoch that ends within a step
COMMAND = [
    "task=pretrain_stage1", "model.vision.frozen=false", "model.vision.depth=1", "model.qformer.depth=2",
    "model.vision.width=32", "model.vision.mlp_width=32", "model.qformer.width=32", "model.qformer.mlp_width=32",
    "model.qformer.dropout=0.1", "task.batch_size=5", "task.accumulate=2", "task.max_steps=40", "task.max_epochs=null",
    "task.save_every=1", "task.log_every=3", "task.eval_every=20", "task.validation.captions=false", "task.eval_batch_size=2",
    "task.contrast_steps=10", "task.keep_last=2", "dataset.train_scenes=64", "dataset.test_scenes=4",
    "dataset.held_out_combinations=0", "dataset.num_workers=0", "optim.warmup_steps=0", "run_name=r", "resume=auto",
]  # fmt: skip


class Zygote:
    """See zygote.py."""

    def __init__(self):
        words = [sys.executable, str(Path(__file__).with_name("zygote.py"))]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout.readline() == "ready\n"

    def start(self, words, output) -> int:
        self.process.stdin.write(json.dumps([words, str(output)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self) -> int:
        return int(self.process.stdout.readline())

    def end(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def zygote():
    made = Zygote()
    yield made
    made.end()


def lines(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same(run, alone):
    assert lines(run) == lines(alone)
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        arrays, expected = (load_file(folder / "checkpoint" / name) for folder in (run, alone))
        assert arrays.keys() == expected.keys()
        assert all(array.tobytes() == expected[key].tobytes() for key, array in arrays.items()), name
    assert not list(run.rglob(".*partial")) and not list(run.rglob(".*old"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("times", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_end_is_the_same(tmp_path, zygote, times):
    def start(outputs):
        return zygote.start([*COMMAND, f"paths.outputs={outputs}"], tmp_path / "output.txt")

    chance = random.Random()  # other moments in each run of the test
    started = time.monotonic()
    start(tmp_path / "alone")
    assert zygote.status() == 0, (tmp_path / "output.txt").read_text()
    whole = time.monotonic() - started

    kills, outputs = 0, [tmp_path / "0"]
    while kills < times:
        child = start(outputs[-1])
        time.sleep(chance.uniform(0, min(whole / 2, 2.5)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = zygote.status()
        if status == 0:  # it came to its end: another one, until there are enough
            outputs.append(tmp_path / str(len(outputs)))
            continue
        assert status == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
        kills += 1
    for folder in outputs:
        start(folder)
        assert zygote.status() == 0, (tmp_path / "output.txt").read_text()
        assert_same(folder / "r", tmp_path / "alone/r")
    said = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in said and "passed over" not in said  # what has a checkpoint's name is whole
    assert said.count("going on from") >= times // 4, said
    print(f"{len(outputs)} runs, {kills} kills, {said.count('going on from')} starts from a checkpoint, {whole:.1f} s alone")
