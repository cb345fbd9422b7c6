"""Costs by stage, from what the log says."""

from __future__ import annotations

import pytest

from blip2x.engine.report_sections.costs import duration, stage_costs, whole_cost
from blip2x.engine.run_files import RunFiles

LINES = [  # 10 steps of 64 samples in 2 s; between the second and the third 3 s of validation
    {"stage": "a", "step": 10, "seconds": 2.0, "samples_per_second": 320.0, "data_wait": 0.5, "memory_gb": 1.5},
    {"stage": "a", "step": 20, "seconds": 4.0, "samples_per_second": 320.0, "data_wait": 0.0, "memory_gb": 1.7},
    {"stage": "a", "step": 20, "eval_loss": 1.0},
    {"stage": "a", "step": 30, "seconds": 9.0, "samples_per_second": 320.0, "data_wait": 0.0, "tokens_per_second": 1234.0},
]
PREDICTIONS = [{"stage": "b", "image_id": n // 2} for n in range(10)]


@pytest.fixture
def run(tmp_path):
    results = {"seconds": 64.2, "peak_memory_gb": 1.75, "starts": 3}
    return RunFiles(tmp_path, metrics=LINES, predictions=PREDICTIONS, results=results)


def test_a_stage_has_its_time_samples_waiting_and_memory(run):
    a, b = stage_costs(run)
    assert (a.stage, a.steps, a.seconds, a.samples) == ("a", "30", "9.0 s", "1,920")
    assert (a.rate, a.tokens, a.memory, a.evaluated) == ("320", "1,234", "1.70 GB", "")
    assert a.wait == "11.1 %"  # half of the first 2 of 9 seconds
    assert (b.stage, b.evaluated, b.seconds) == ("b", "5", "")


def test_the_whole_run_sums_up(run):
    assert whole_cost(run) == {
        "Time": "1 min 4 s (the last of 3 starts)",
        "Peak memory": "1.75 GB",
        "Samples trained on": "1,920",
        "Pictures evaluated": "5",
    }


def test_steps_that_were_taken_again_count_once(run):
    run.metrics = [*LINES[:2], {**LINES[1], "seconds": 4.4}, LINES[3]]
    assert stage_costs(run)[0].samples == "1,920"


def test_neither_an_odd_line_nor_validations_change_the_number_of_samples(tmp_path):
    lines = [{"stage": "a", "step": n, "seconds": n / 10, "samples_per_second": 160.0} for n in range(10, 70, 10)]
    lines[2]["samples_per_second"] = 9.0
    assert stage_costs(RunFiles(tmp_path, metrics=lines))[0].samples == "960"  # 60 steps of 16
    slow = [{"stage": "a", "step": n, "seconds": n / 5, "samples_per_second": 160.0} for n in range(10, 70, 10)]
    slow[0]["seconds"] = 1.0
    behind = [row for line in slow for row in (line, {"stage": "a", "step": line["step"], "eval_loss": 1.0})]
    assert stage_costs(RunFiles(tmp_path, metrics=behind))[0].samples == "960"


def test_a_run_that_says_nothing_costs_nothing_that_is_known(tmp_path):
    run = RunFiles(tmp_path, metrics=[{"stage": "a", "step": 1, "loss": 1.0}], results={"seconds": None})
    assert stage_costs(run) == [] and whole_cost(run) == {}


@pytest.mark.parametrize(("seconds", "said"), [(4.21, "4.2 s"), (280.1, "4 min 40 s"), (10925, "3 h 2 min")])
def test_duration(seconds, said):
    assert duration(seconds) == said
