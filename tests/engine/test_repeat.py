"""What two runs have in common, and how their difference is said."""

from __future__ import annotations

import json

import pytest

from blip2x.engine.repeat import compare, environment_changes, environment_of, sentence

LINES = [
    {"stage": "s", "step": 1, "lr": 0.1, "loss": 2.0, "seconds": 1.0},
    {"stage": "s", "step": 1, "CIDEr": 0.5},
    {"stage": "s", "step": 2, "lr": 0.1, "loss": float("nan"), "seconds": 2.0},
]
RESULTS = {"s": {"CIDEr": 0.5, "by": {"a": 1}, "perplexity": float("nan")}, "seconds": 9.0, "peak_memory_gb": 1.0}


@pytest.fixture
def run(tmp_path):
    """`run(name, results, lines, predictions)` -> a run folder."""

    def make(name, results=RESULTS, lines=LINES, predictions="{}"):
        folder = tmp_path / name
        (folder / "s").mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "s", "st')
        (folder / "s/predictions.jsonl").write_text(predictions)
        return folder

    return make


def test_time_and_memory_are_no_difference(run):
    lines = [{**line, "seconds": 7.0} if "seconds" in line else line for line in LINES]
    first, second = run("a"), run("b", {**RESULTS, "seconds": 1.0, "peak_memory_gb": 2.0, "starts": 2}, lines)
    found = compare(first, second)
    assert found.is_identical and found.compared == {"results": 3, "lines of metrics": 3, "files of predictions": 1}
    assert sentence(first, found) == f"identical to {first}: 3 results, 3 lines of metrics, 1 files of predictions"


def test_each_difference_is_named(run):
    lines = [LINES[0], {**LINES[1], "CIDEr": 0.25}, LINES[2]]
    first, second = run("a"), run("b", {**RESULTS, "s": {"CIDEr": 0.25, "by": {"a": 1}, "BLEU": 1}}, lines, "{}\n")
    found = compare(first, second)
    assert {row["metric"]: (row["was"], row["is"]) for row in found.differences if row["metric"] != "s/perplexity"} == {
        "s/CIDEr": (0.5, 0.25),
        "s/BLEU": (None, 1),
    }
    assert found.first_line == {"stage": "s", "step": 1, "metric": "CIDEr", "was": 0.5, "is": 0.25}
    said = sentence(first, found)
    assert f"differs from {first}: s/CIDEr was 0.5, is 0.25 (-0.25); " in said and "s/BLEU was none, is 1" in said
    assert "metrics from s step 1 on: CIDEr was 0.5" in said and said.endswith("s/predictions.jsonl")


def test_a_line_that_only_one_has(run):
    found = compare(run("a"), run("b", lines=LINES[:2]))
    assert found.first_line == {"stage": "s", "step": 2, "metric": "the line", "was": "there", "is": "not there"}
    assert not found.is_identical


def test_a_run_that_did_not_end_is_no_comparison(run):
    first = run("a", {"s": {"CIDEr": 1}})
    assert compare(first, run("b")) is None
    assert sentence(first, None) == f"{first} did not come to its end, so there is nothing to compare with"


def test_what_was_other_at_the_time(run):
    folder = run("a")
    (folder / "versions.json").write_text('{"numpy": "1.26", "git_commit": "0123456789", "git_dirty": true}')
    (folder / "hardware.json").write_text('{"cpu": "x", "threads": 2, "host": "h", "gpus": ["A", "B"]}')
    (folder / "diff.patch").write_bytes(b"# Not tracked: a\ndiff --git x")
    before = environment_of(folder)
    assert environment_changes(before, before) == []
    now = {**before, "numpy": "1.27", "git_commit": "abcdefghij", "gpus": [], "patch": b"", "new": 1}
    assert environment_changes(before, now) == [
        "git_commit was 01234567, is abcdefgh",
        "gpus was A, B, is none",
        "numpy was 1.26, is 1.27",
        "uncommitted changes of the code differ (diff.patch)",
    ]
    (folder / "diff.patch").write_bytes(b"# Not tracked: a, b\ndiff --git x")
    assert environment_changes(before, environment_of(folder)) == []
    assert environment_changes(environment_of(folder.parent), now) == []  # an older run, which wrote nothing of it down
