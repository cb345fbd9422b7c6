"""docs/speed.md says what docs/speed.json does, and blip2x's side of the comparison works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.speed.page import page
from tests.speed.rows import OURS, ROWS, SIZES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_up_to_date():
    record = json.loads((DOCS / "speed.json").read_text(encoding="utf-8"))
    again = "run: python tests/speed/page.py docs/speed.json > docs/speed.md"
    assert (DOCS / "speed.md").read_text(encoding="utf-8") == page(record), again


def test_slower_rows_are_named_and_what_failed_is_said():
    row = {"count": 2, "ways": {"ours": {"seconds": [2.0, 3.0], "peak_mib": 1.0}, "hf": {"seconds": [1.0, 6.0]}}}
    broken = {"count": 1, "ways": {"ours": {"seconds": [1.0]}, "hf": {"error": "no memory"}}}
    record = {
        **{
            "model": "small",
            "threads": 2,
            "date": "",
            "command": "",
            "load_before": 3.0,
            "rows": {"vision": row, "load": broken},
        },
        "machine": dict.fromkeys(("cpu", "usable_cores", "memory_gb", "system"), ""),
        "versions": {"git_commit": None},
    }
    text = page(record)
    assert "slower in:**\n\n- image encoder alone (2.00 times Hugging Face's time)\n" in text
    assert "| Hugging Face | 500 ms | **0.50** (0.50 to 2.00) |" in text
    assert "failed: no memory" in text and "was busy with other work (3.0" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tests.speed.made import make

    folder = tmp_path_factory.mktemp("speed") / "tiny_opt"
    make(folder, "tiny_opt")
    return folder


@pytest.mark.parametrize("row", ROWS)
def test_our_side_of(row, folder):
    from blip2x.models.assemblies.stage1 import Stage1Model
    from tests.speed.ours import prepare

    if row == "stage1_features" and not hasattr(Stage1Model, "encoded"):
        pytest.skip("there is no cache of features yet")
    for way in set(ROWS[row].ways) & set(OURS):
        run, answer = prepare(row, way, folder)
        answer = answer or run() or {}
        assert ROWS[row].answer != "texts" or len(answer["texts"]) == SIZES["tiny_opt"].count(row)
        if ROWS[row].answer == "numbers":
            assert all(np.isfinite(array).all() for array in answer.values()) and answer
