"""What a job's folder says about it, and what a command that is started again does with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blip2x.config.compose import compose_config
from blip2x.engine import sweep
from blip2x.engine.resume import may_go_on
from blip2x.errors import UserError


def config(*words: str, folder: Path):
    return compose_config(["task=pretrain_vision", f"paths.outputs={folder.parent.parent}", *words])


def leave(folder: Path, *words: str, state: str) -> None:
    """The folder of a run that was placed there and has come to `state`."""
    made = config(*words, folder=folder)
    assert sweep.place(made, folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(made), resolve=True))
    (folder / "status.json").write_text(json.dumps({"state": state, "error": None}))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "s" / "seed=1"


def test_a_job_that_has_not_begun(folder):
    made = config(folder=folder)
    assert sweep.place(made, folder)
    assert (made.sweep, made.run_name, made.paths.outputs, made.resume) == ("s", "seed=1", str(folder.parent), "never")
    assert not folder.exists()
    sweep.record(folder, "failed", "no model")  # before it had a config
    assert json.loads((folder / "status.json").read_text()) | {"started": 0, "ended": 0} == {
        "state": "failed",
        "error": "no model",
        "started": 0,
        "ended": 0,
    }
    assert sweep.place(made, folder) and not folder.exists()  # so that the run can make it


def test_a_complete_job_is_passed_over_whatever_does_not_matter(folder):
    leave(folder, state="complete")
    assert not sweep.place(config(folder=folder), folder)
    assert not sweep.place(config("threads=1", "objective=pretrain_vision.loss", "prune.min_runs=9", folder=folder), folder)
    anew = config("overwrite=true", folder=folder)
    assert sweep.place(anew, folder) and anew.resume == "never"


@pytest.mark.parametrize("state", ["complete", "failed"])
def test_a_job_of_another_config(folder, state):
    """Batches, too, which matter to a run that is made anew and not to one that is gone on with."""
    leave(folder, state=state)
    with pytest.raises(UserError, match=r"another config: optim.lr was 0.002, is 0.005; task.batch_size was 64, is 7\. Give"):
        sweep.place(config("optim.lr=5e-3", "task.batch_size=7", folder=folder), folder)


@pytest.mark.parametrize("state", ["failed", "interrupted", "running"])
def test_a_job_that_did_not_come_to_its_end_goes_on(folder, state):
    leave(folder, state=state)
    made = config(folder=folder)
    assert sweep.place(made, folder) and made.resume == "auto"


def test_a_job_that_was_killed_before_it_had_a_config(folder):
    made = config(folder=folder)
    folder.mkdir(parents=True)
    (folder / "command.txt").write_text("run.py\n")
    assert sweep.place(made, folder) and not may_go_on(folder, OmegaConf.structured(made))
    assert made.resume == "auto" and not folder.exists()


def test_the_state_of_a_run_without_a_status(folder):
    assert sweep.state(folder) is None
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"caption": {"CIDEr": 1.5}}')
    assert sweep.state(folder) is None  # a pipeline on its way
    (folder / "results.json").write_text('{"caption": {"CIDEr": 1.5, "bad": NaN}, "seconds": 3}')
    assert sweep.state(folder) == "complete"
    values = [sweep.objective(folder, key) for key in ("caption.CIDEr", "caption.bad", "caption.SPICE", "vqa.accuracy")]
    assert values == [1.5, None, None, None]
    sweep.check_objective(folder, "caption.CIDEr")
    with pytest.raises(UserError, match=r"objective=caption.SPICE is no metric of .*; it has caption.CIDEr, caption.bad"):
        sweep.check_objective(folder, "caption.SPICE")


def test_failures_of_all_processes(tmp_path):
    sweep.note_failure(tmp_path / "s" / "a", "no file 'x'")
    sweep.note_failure(tmp_path / "s" / "b", "too large")
    sweep.record(tmp_path / "s" / "c", "running", "")
    sweep.record(tmp_path / "s" / "d", "failed", "by an earlier command, which this one has not tried again")
    found = sweep.failures(tmp_path / "s")
    assert list(found) == ["c", "a", "b"] and found["a"] == "no file 'x'" and "killed" in found["c"]


def test_a_status_that_says_so_is_kept(folder):
    sweep.record(folder, "failed", "as the run itself said")
    sweep.record(folder, "failed", "again")
    assert json.loads((folder / "status.json").read_text())["error"] == "as the run itself said"


def test_jobs_are_passed_over_without_paddle():
    code = "import blip2x.engine.sweep_job, sys; sys.exit('paddle' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
