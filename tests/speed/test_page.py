"""docs/speed.md says what docs/speed.json does, and blip2x's side of the comparison works."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.speed import compare
from tests.speed.page import SAME, page
from tests.speed.rows import OURS, ROWS, SIZES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_up_to_date():
    record = json.loads((DOCS / "speed.json").read_text(encoding="utf-8"))
    again = "run: python tests/speed/page.py docs/speed.json > docs/speed.md"
    assert (DOCS / "speed.md").read_text(encoding="utf-8") == page(record), again


def record(**rows) -> dict:
    """Of some rows, with nothing about the machine."""
    return {
        **{"model": "small", "threads": 2, "date": "", "command": "", "load_before": 3.0, "rows": rows},
        "machine": dict.fromkeys(("cpu", "usable_cores", "memory_gb", "system"), ""),
        "versions": {"git_commit": None},
    }


def test_slower_rows_are_named_and_what_failed_is_said():
    row = {"count": 2, "ways": {"ours": {"seconds": [2.0, 3.0], "peak_mib": 1.0}, "hf": {"seconds": [1.0, 6.0]}}}
    broken = {"count": 1, "ways": {"ours": {"seconds": [1.0]}, "hf": {"error": "no memory"}}}
    text = page(record(vision=row, load=broken))
    assert "slower in:**\n\n- image encoder alone (2.00 times Hugging Face's time)\n" in text
    assert "| Hugging Face | 500 ms | **0.50** (0.50 to 2.00) |" in text
    assert "failed: no memory" in text and "was busy with other work (3.0" in text
    assert "**Failed, in whole or in part:**\n\n- loading the model of stage 2 from its folder: Hugging Face\n" in text


def test_what_failed_later_is_said_and_no_failed_row_counts_as_won():
    ways = {"ours": {"seconds": [1.0, 1.0]}, "hf": {"seconds": [2.0], "error": "no answer within 900 s"}}
    text = page(record(vision={"count": 2, "ways": ways}))
    assert "slower in none of the rows as far as none failed.\n\n**Failed" in text
    assert "| 1.00 s | **2.00** (2.00 to 2.00) | **failed after 1 turn: no answer within 900 s** |" in text
    won = page(record(vision={"count": 2, "ways": {"ours": {"seconds": [1.0]}, "hf": {"seconds": [2.0]}}}))
    assert "slower in none of the rows.\n" in won and "Failed" not in won


ANSWERING = """
import json, sys, time
way = sys.argv[sys.argv.index("--way") + 1]
say = lambda **message: print(json.dumps(message), flush=True)
say(versions={}, answer={"texts": ["a"] * (1 if way == "ours" else TEXTS)})
for number, _ in enumerate(sys.stdin):
    if way != "ours" and number == HANGS_AT:
        time.sleep(60)
    say(seconds=1.0, answer=None)
say(peak_mib=1.0)
"""


@pytest.mark.parametrize(
    ("texts", "hangs_at", "repeats", "named"), [(1, 2, 1, "no answer within 2 s"), (2, None, 3, "results cannot be compared")]
)
def test_a_way_that_hangs_or_answers_otherwise_fails_alone(tmp_path, monkeypatch, texts, hangs_at, repeats, named):
    """Its processes are stood in for by a script that answers as they do; PyTorch's get the variables of before."""
    script = tmp_path / "answering.py"
    script.write_text(ANSWERING.replace("TEXTS", str(texts)).replace("HANGS_AT", str(hangs_at)))
    started, start = [], compare.subprocess.Popen

    def popen(command, **named):
        started.append((start([sys.executable, str(script), *command[1:]], **named), named["env"]))
        return started[-1][0]

    monkeypatch.setattr(compare.subprocess, "Popen", popen)
    monkeypatch.setattr(compare, "LIMIT", 2.0)
    monkeypatch.setattr(compare, "PAUSE", 0.0)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "5")  # as `prepare_process` would
    args = argparse.Namespace(torch=sys.executable, threads=1, repeats=3, seconds=60.0, model="tiny_opt")
    row, _ = compare.measure("caption", tmp_path, args, {"PATH": "x"})
    assert row["ways"]["ours"] == {"seconds": [1.0, 1.0, 1.0], "peak_mib": 1.0}
    assert row["ways"]["hf"]["seconds"] == [1.0] * repeats and named in row["ways"]["hf"]["error"]
    assert all(process.poll() is not None for process, _ in started)
    assert all(env["PATH"] == "x" and "MKL_DEBUG_CPU_TYPE" not in env for _, env in started)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tests.speed.made import make

    folder = tmp_path_factory.mktemp("speed") / "tiny_opt"
    make(folder, "tiny_opt")
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_our_side_of(row, folder):
    from tests.speed.ours import prepare

    for way in set(ROWS[row].ways) & set(OURS):
        run, answer = prepare(row, way, folder)
        answer = answer or run() or {}
        assert ROWS[row].answer != "texts" or len(answer["texts"]) == SIZES["tiny_opt"].count(row)
        if ROWS[row].answer == "numbers":
            assert all(np.isfinite(array).all() for array in answer.values()) and answer


def test_kept_features_are_rounded(folder):
    """As the cache rounds them; no more than what the page takes for the same."""
    from tests.speed.ours import prepare

    kept, recomputed = (prepare("stage1_features", way, folder)[1] for way in OURS)
    differences = [abs(float(kept[name] - recomputed[name])) for name in recomputed]
    assert 0 < max(differences) < SAME * max(map(float, recomputed.values()))
