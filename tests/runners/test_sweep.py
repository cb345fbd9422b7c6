"""Several jobs in one command: ``python runners/run.py -m ...``, mostly in this process, which has imported paddle already."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blip2x import startup
from blip2x.config import sweep as names
from blip2x.engine import compare, sweep_job
from blip2x.engine.run_files import TIMES
from blip2x.tasks.common import launch

ROOT = Path(__file__).resolve().parents[2]
FEW = ["dataset.train_scenes=64", "dataset.test_scenes=12", "optim.warmup_steps=0"]
STEPS = ["task=pretrain_vision", "task.batch_size=8", "task.max_epochs=null", "task.max_steps=2", *FEW]
STAGES = "task.stages=[{task: pretrain_vision, overrides: ['task.batch_size=8', 'task.max_steps=1', 'task.max_epochs=null']}]"


@pytest.fixture
def program(tmp_path, monkeypatch, capfd):
    """`program(*words)`: exit code, output and errors of the command line `words`."""
    monkeypatch.setenv("BLIP2X_OUTPUTS", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(startup, "_prepared_threads", [None])  # what a process of its own would ask for
        for module, name in ((names, "_names"), (sweep_job, "_begun"), (sweep_job, "_stopped")):
            monkeypatch.setattr(module, name, type(getattr(module, name))())
        monkeypatch.setattr(sys, "argv", ["runners/run.py", *words])
        try:
            runpy.run_path(str(ROOT / "runners/run.py"), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


def trained(folder: Path) -> list:
    """The losses, gradients and scores of a run: its lines of metrics.jsonl without times."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_six_runs_of_which_one_fails_and_a_restart(program, tmp_path):
    """The others go on, and started again the sweep makes only what is not complete: a run that was killed, and the bad one."""
    words = ["-m", *STEPS, "seed=1,2,-1,3,4,5", "sweep=s"]
    code, out, err = program(*words)
    folder = tmp_path / "out" / "sweeps" / "s"
    assert code == 2 and "Traceback" not in err and "Warning" not in err and "WARNING" not in err
    assert "error: 1 of this sweep's jobs did not run to the end:\n  seed=-1: seed must be at least 0" in err
    assert [line.split()[0] for line in out.splitlines() if line.startswith("\t#")] == [f"#{number}" for number in range(6)]
    good = [f"seed={seed}" for seed in range(1, 6)]
    assert sorted(path.parent.name for path in folder.glob("*/results.json")) == good
    assert json.loads((folder / "seed=-1" / "status.json").read_text())["state"] == "failed"
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and {path.name for path in folder.parent.iterdir()} == {"s"}
    assert all(name in (folder / "comparison.html").read_text() for name in good)
    before = {name: trained(folder / name) for name in good}
    assert before["seed=1"] != before["seed=2"]

    killed = folder / "seed=4"
    (killed / "results.json").unlink()
    (killed / "status.json").write_text('{"state": "running", "error": null, "started": "2026-01-01", "ended": null}')
    shutil.rmtree(killed / "checkpoint")
    untouched = {name: (folder / name / "results.json").stat().st_mtime_ns for name in good if name != "seed=4"}
    code, out, err = program(*words)
    assert code == 2 and "seed=-1: seed must be at least 0" in err
    assert [line for line in out.splitlines() if "passed over" in line] == [
        f"{name}: complete, passed over" for name in good if name != "seed=4"
    ]
    assert {name: (folder / name / "results.json").stat().st_mtime_ns for name in untouched} == untouched
    assert trained(killed) == before["seed=4"]


def test_pipelines_in_a_sweep(program, tmp_path):
    """Each has its own folder, words and results, as it would have alone; given names are kept."""
    code, _, err = program("-m", STAGES, "seed=1,2", "sweep=s", "run_name='run-${seed}'", *FEW)
    folder = tmp_path / "out" / "sweeps" / "s"
    assert code == 0 and err == ""
    commands = [(folder / name / "command.txt").read_text() for name in ("run-1", "run-2")]
    assert "seed=1" in commands[0] and "seed=2" in commands[1] and not any(" -m " in c or "sweep=" in c for c in commands)

    code, _, err = program(STAGES, "seed=2", "run_name=alone", *FEW)
    assert code == 0 and err == ""
    second = trained(folder / "run-2")
    assert second == trained(tmp_path / "out" / "alone") != trained(folder / "run-1")


def test_trainings_that_are_behind_are_stopped(program, tmp_path):
    """By something that is surely less in the last run than in those before it: its learning rate."""
    prune = ["prune.metric=pretrain_vision.lr", "prune.best_is=max", "prune.min_runs=2", "task.log_every=1", "optim.eta_min=0"]
    code, out, err = program("-m", *STEPS, *prune, "optim.lr=2e-3,3e-3,1e-3", "sweep=s")
    folder = tmp_path / "out" / "sweeps" / "s"
    assert code == 0 and err == ""
    assert "stopped: pretrain_vision.lr is 0.001 at step 1, and 0.0025 in the middle of 2 other runs" in out
    ends = {path.parent.name: json.loads(path.read_text()).get("pruned") for path in folder.glob("*/results.json")}
    assert ends == {"optim.lr=0.002": None, "optim.lr=0.003": None, "optim.lr=0.001": 1}
    assert [row["step"] for row in trained(folder / "optim.lr=0.001")] == [1]


@pytest.fixture
def quick(monkeypatch):
    """Runs that cost nothing: what they would have scored depends on the rate, and they crash above 0.1; their rates."""
    made = []

    def score(config, command):
        made.append(config.optim.lr)
        if config.optim.lr > 0.1:
            raise RuntimeError("crashed")
        folder = Path(config.paths.outputs, config.run_name)
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))
        metrics = {"digit_accuracy": -abs(config.optim.lr - 0.01)}
        (folder / "results.json").write_text(json.dumps({"pretrain_vision": metrics, "seconds": 1}))

    monkeypatch.setattr(launch, "launch", score)
    monkeypatch.setattr(compare, "write_comparison", lambda runs, target, console: made.append(len(runs)))
    return made


def test_a_search_and_its_restart(program, quick):
    """Started again it asks for the same runs, which are complete; with more trials it goes on."""
    words = ["experiment=search_lr_pruned", "objective_of_failed=-1", "sweep=s"]
    words += ["hydra.sweeper.params={optim.lr: 'tag(log,interval(1e-3,1))'}"]
    code, out, err = program(*words, "hydra.sweeper.n_trials=4")
    rates, runs = quick[:4], quick[4:]
    failed = sum(rate > 0.1 for rate in rates)
    assert len(set(rates)) == 4 and 0 < failed < 4 and runs == [4]  # those that failed are compared, too
    assert code == 2 and f"{failed} of this sweep's jobs" in err and "RuntimeError: crashed" in err
    best = min(rates, key=lambda rate: abs(rate - 0.01))
    assert f"best pretrain_vision.digit_accuracy: {-abs(best - 0.01):.6g} with optim.lr={best}\n" in out
    quick.clear()
    _, out, _ = program(*words, "hydra.sweeper.n_trials=5")
    assert quick[:failed] == [rate for rate in rates if rate > 0.1] and len(quick) == failed + 2  # and a new one
    assert out.count("complete, passed over") == 4 - failed


def test_what_is_wrong_with_the_sweep_itself(program, monkeypatch):
    assert program("seed=1", "sweep=s") == (
        2,
        "",
        "error: sweep=s names a sweep, but this is one run: add -m, or name it by run_name\n",
    )
    code, _, err = program("-m", "seed=1,2", "sweep=a/b")
    assert (
        code == 2
        and err == "error: sweep=a/b must be a plain folder name, without slashes; choose the place with paths.outputs\n"
    )
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setattr(os, "_exit", sys.exit)  # as a process among several ends
    code, _, err = program("-m", "seed=1,2")
    assert code == 2 and "give sweep=NAME" in err


@pytest.mark.slow
def test_several_at_a_time_one_is_killed_and_ctrl_c(tmp_path):
    """joblib: a run that the system kills has failed; Ctrl-C lets runs save, starts no others, and says how to go on."""
    words = ["-m", *STEPS[:-4], "task.max_steps=5000", *FEW, "seed=1,2,3", "sweep=s", "hydra/launcher=joblib"]
    command = [sys.executable, str(ROOT / "runners/run.py"), *words, "hydra.launcher.n_jobs=1"]
    folder = tmp_path / "out" / "sweeps" / "s"

    def wait_for(path: Path) -> None:
        for _ in range(1200):
            if path.exists():
                return
            time.sleep(0.1)
        raise AssertionError(f"no {path}")

    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "BLIP2X_OUTPUTS": "out"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_for(folder / "seed=1" / "metrics.jsonl")
        memory = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == process.pid:  # of this session
                memory[int(path.parent.name)] = int(fields[21])  # pages in memory
        os.kill(max(memory, key=memory.get), signal.SIGKILL)  # whom the system would choose
        wait_for(folder / "seed=2" / "metrics.jsonl")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 75 and "go on with it by" in err and not (folder / "seed=3").exists()
    states = {name: json.loads((folder / name / "status.json").read_text()) for name in ("seed=1", "seed=2")}
    assert states["seed=1"]["state"] == "failed" and "SIGKILL" in states["seed=1"]["error"]
    assert states["seed=2"]["state"] == "interrupted" and "saved at step" in states["seed=2"]["error"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="the extra slurm is not installed")
def test_submitit(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "runners/run.py"),
        "-m",
        *STEPS,
        "seed=1,-1",
        "sweep=s",
        "hydra/launcher=submitit_local",
    ]
    env = {**os.environ, "BLIP2X_OUTPUTS": "out"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "seed=-1: seed must be at least 0" in done.stderr
    assert (tmp_path / "out/sweeps/s/seed=1/results.json").exists() and (tmp_path / "out/sweeps/s/comparison.html").exists()
