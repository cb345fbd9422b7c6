"""Jobs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest

from blip2x.engine import sweep, sweep_job
from blip2x.errors import Interrupted, UserError


@pytest.fixture
def child(tmp_path, monkeypatch):
    """`child(action)`: the status of a job that does `action` in a process of its own."""
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: SimpleNamespace(launcher=SimpleNamespace(n_jobs=1)))
    monkeypatch.setattr(sweep_job, "_stopped", [])
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
def test_one_that_is_interrupted_is_the_last(child, error):
    status = child(raising(error))
    assert sweep_job._stopped and sweep_job.run_job(None, None) is None
    if isinstance(error, Interrupted):
        assert (status["state"], status["error"]) == ("interrupted", "SIGINT; saved")


@pytest.mark.parametrize(("jobs", "threads"), [(1, 8), (2, 4), (3, 2), (16, 1), (-1, 1), (-5, 2)])
def test_jobs_share_the_cores(monkeypatch, jobs, threads):
    monkeypatch.setattr(sweep_job.HydraConfig, "get", lambda: SimpleNamespace(launcher=SimpleNamespace(n_jobs=jobs)))
    monkeypatch.setattr(sweep_job.os, "sched_getaffinity", lambda process: set(range(8)))
    assert sweep_job._threads() == threads
