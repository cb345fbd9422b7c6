"""Several jobs in one process: ``python runners/run.py -m ...``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = "task.stages=[{task: pretrain_vision, overrides: ['task.max_steps=1', 'task.max_epochs=null']}]"
FEW = ["dataset.train_scenes=64", "dataset.test_scenes=12"]


def start(folder: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "runners/run.py"), *words, *FEW],
        cwd=folder,
        env={**os.environ, "BLIP2X_OUTPUTS": str(folder / "out")},
        capture_output=True,
        text=True,
        timeout=120,
    )


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["pretrain_vision"]


def test_pipelines_in_a_sweep(tmp_path):
    """Each has its own folder, words and results, a bad one does not stop the others, and nothing else is written."""
    done = start(tmp_path, "-m", STAGES, "seed=1,2,-1", "run_name='seed-${seed}'")
    assert done.returncode == 2
    assert "error: seed must be at least 0" in done.stderr and "1 of this sweep's jobs" in done.stderr
    assert "Warning" not in done.stderr and "WARNING" not in done.stderr and "Traceback" not in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("\t#")] == ["#0", "#1", "#2"]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"seed-1", "seed-2", "multirun.yaml"}
    commands = [(tmp_path / "out" / name / "command.txt").read_text() for name in ("seed-1", "seed-2")]
    assert "seed=1" in commands[0] and "seed=2" in commands[1] and not any(" -m " in c for c in commands)

    alone = start(tmp_path, STAGES, "seed=2", "run_name=alone")
    assert alone.returncode == 0 and alone.stderr == ""
    second = results(tmp_path / "out" / "seed-2")
    assert second == results(tmp_path / "out" / "alone") != results(tmp_path / "out" / "seed-1")
