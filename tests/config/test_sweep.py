"""Jobs of a sweep do not take each other's names."""

from __future__ import annotations

import pytest

from blip2x.config import sweep
from blip2x.errors import UserError


@pytest.fixture
def swept(monkeypatch):
    monkeypatch.setattr(sweep, "in_sweep", lambda: True)
    monkeypatch.setattr(sweep, "_names", set())


def test_a_single_run_is_no_sweep():
    assert not sweep.in_sweep()
    assert sweep.job_command(["run.py", "-m"]) == ["run.py", "-m"]
    for _ in range(2):
        sweep.claim_run_name("x")


def test_two_jobs_of_one_name(swept):
    sweep.claim_run_name(None)
    sweep.claim_run_name(None)
    sweep.claim_run_name("a")
    sweep.claim_run_name("b")
    with pytest.raises(UserError, match="run_name=a is the name of an earlier job"):
        sweep.claim_run_name("a")
