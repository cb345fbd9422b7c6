"""Jobs in processes of their own."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from blip2x.engine import sweep, sweep_job
from blip2x.errors import Interrupted, UserError


@pytest.fixture
def child(tmp_path, monkeypatch):
    """`child(action)`: the status of a job that does `action` in a process of its own."""
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: SimpleNamespace(launcher=SimpleNamespace(n_jobs=1)))
    monkeypatch.setattr(sweep_job, "_stopped", [])
    monkeypatch.setattr(sweep_job, "_begun", [None])  # no worker, which would end with its parent
    monkeypatch.setattr(sweep_job, "sweep_folder", lambda: tmp_path / "s")
    monkeypatch.setattr(sweep_job, "job_name", lambda: "next")
    before = signal.getsignal(signal.SIGINT)

    def run(action):
        sweep_job._run_in_child(None, tmp_path / "s" / "job", lambda config, threads: action())
        path = tmp_path / "s" / "job" / "status.json"
        return json.loads(path.read_text()) if path.exists() else None

    yield run
    signal.signal(signal.SIGINT, before)


def raising(error):
    def action():
        raise error

    return action


def test_one_that_ends_well(child, tmp_path):
    assert child(lambda: (tmp_path / "done").touch()) is None and (tmp_path / "done").exists()
    assert not sweep.failures(tmp_path / "s")


def test_one_that_the_system_kills(child, tmp_path):
    status = child(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert status["state"] == "failed" and status["error"] == "its process ended by SIGKILL, perhaps for want of memory"
    assert sweep.failures(tmp_path / "s") == {"job": status["error"]}


@pytest.mark.parametrize(("error", "said"), [(UserError("no file"), "no file"), (KeyError("x"), "KeyError: 'x'")])
def test_one_that_fails(child, tmp_path, error, said):
    status = child(raising(error))
    assert (status["state"], status["error"]) == ("failed", said) and sweep.failures(tmp_path / "s") == {"job": said}
    assert not sweep_job._stopped


@pytest.mark.parametrize("error", [Interrupted("SIGINT; saved; run_name=job resume=auto goes on with it"), KeyboardInterrupt()])
def test_one_that_is_interrupted_is_the_last(child, tmp_path, error):
    status = child(raising(error))
    assert sweep_job._stopped and sweep_job.run_job(None, None) is None
    assert "not started, for its process was stopped before by what interrupted job" in sweep.failures(tmp_path / "s")["next"]
    if isinstance(error, Interrupted):
        assert (status["state"], status["error"]) == ("interrupted", "SIGINT; saved")


def test_a_job_ends_with_its_worker(child, tmp_path):
    """Which is killed without a word; else the job would train on, and the sweep be unable to go on with it."""
    reader, writer = os.pipe()

    def job():
        os.write(writer, b"runs")
        time.sleep(60)

    worker = os.fork()
    if not worker:
        try:
            child(job)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 4) == b"runs"
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert select.select([reader], [], [], 10)[0] and os.read(reader, 1) == b""  # nobody has it open any more
    os.close(reader)


def ended(tmp_path, *words: str) -> int:
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path / "s")}}, "objective": "s.m"})
    return sweep_job._end(config, 0, ["run.py", "-m", *words])


def test_the_end_of_a_sweep(tmp_path, capsys):
    """Jobs that failed alike are listed once, and what goes on deletes nothing."""
    for name, why in (("a", "no weights"), ("b", "no weights"), ("c", "no weights"), ("d", "too large")):
        sweep.note_failure(tmp_path / "s" / name, why)
    (tmp_path / "s" / "f").mkdir()
    (tmp_path / "s" / "f" / "config.yaml").write_text("task:\n  kind: compare\n")  # nothing to compare
    assert ended(tmp_path, "overwrite=true", "seed=1,2") == 2
    assert capsys.readouterr().err == (
        "error: 4 of this sweep's jobs did not run to the end:\n  a and 2 more: no weights\n  d: too large\n"
        "what is complete is passed over by\n  python run.py -m seed=1,2 sweep=s\n"
    )


def test_tasks_of_slurm_know_their_place_before_the_first_job(monkeypatch):
    for name in ("PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sweep_job.os, "environ", dict(os.environ))
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0", "SLURM_PROCID": "1"}
    step |= {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}
    sweep_job.os.environ.update(step)
    monkeypatch.setattr(sweep_job, "begin_sweep", lambda config: Path("unused"))
    config = OmegaConf.create({"hydra": {"runtime": {"choices": {"hydra/sweeper": "optuna"}}}, "sweep": None})
    with pytest.raises(SystemExit):
        sweep_job.SweepStart().on_multirun_start(config)
    assert not sweep_job._is_main()


@pytest.mark.parametrize(("jobs", "threads"), [(1, 8), (2, 4), (3, 2), (16, 1), (-1, 1), (-5, 2)])
def test_jobs_share_the_cores(monkeypatch, jobs, threads):
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: SimpleNamespace(launcher=SimpleNamespace(n_jobs=jobs)))
    monkeypatch.setattr(sweep_job.os, "sched_getaffinity", lambda process: set(range(8)))
    assert sweep_job._threads() == threads
