"""What a report says first of a run that did not come to its end."""

from __future__ import annotations

import pytest

from blip2x.engine.report_sections.state import machine, unfinished
from blip2x.engine.run_files import RunFiles

DONE = {"caption": {"CIDEr": 1.0}, "seconds": 3.0}


@pytest.mark.parametrize(
    ("status", "results", "state"),
    [
        ({"state": "complete"}, DONE, None),
        ({"state": "running"}, DONE, None),  # the report is written before the run ends
        ({}, DONE, None),
        ({}, {"CIDEr": 1.0}, None),
        ({"state": "failed", "error": "disk full"}, {}, "failed"),
        ({"state": "failed", "error": "disk full"}, DONE, "failed"),
        ({"state": "interrupted"}, {}, "interrupted"),
        ({"state": "running"}, {}, "not finished"),
        ({}, {}, "not finished"),
    ],
)
def test_state(tmp_path, status, results, state):
    found = unfinished(RunFiles(tmp_path, status=status, results=results))
    assert (found and found.state) == state
    if found:
        assert found.error == {"failed": "disk full", "interrupted": ""}.get(
            state, "When this page was made, it was still going on, or something had killed it."
        )
        assert found.reached == "It logged no step."


def test_it_tells_how_far_the_run_came(tmp_path):
    metrics = [{"stage": "pretrain_stage1", "step": step} for step in (500, 1000)]
    run = RunFiles(tmp_path, metrics=metrics, schedules={"pretrain_stage1": {"total_steps": 2000}})
    assert unfinished(run).reached == "Its log ends in Stage 1: align, step 1,000 of 2,000."


def test_a_machine_is_told_in_words():
    hardware = {
        "cpu": "Xeon",
        "cores": 2,
        "memory_gb": 7.84,
        "gpus": [{"name": "A100", "memory_gb": 80}],
        "disk": None,
        "x": [],
    }
    assert machine(hardware) == {"cpu": "Xeon", "cores": "2", "memory gb": "7.8", "gpus": "name A100, memory gb 80"}
