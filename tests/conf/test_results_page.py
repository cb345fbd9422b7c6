"""docs/results.md has a row for every experiment that reproduces a published figure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blip2x.config.auto import CONF_FOLDER

PAGE = Path(__file__).resolve().parents[2] / "docs/results.md"
# `# VQAv2 zero-shot, ViT-g + OPT-2.7B: accuracy 53.5 % on val (paper, table 2).`
FIRST = re.compile(r"(?P<what>[^:]+): (?P<figure>.+?) \((?P<source>paper, tables? [\d and]+)\)")


def rows() -> list[str]:
    found = []
    for path in sorted((CONF_FOLDER / "experiment").glob("*.yaml")):
        comments = re.findall(r"^# (?!@package)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        match = FIRST.search(" ".join(comments[:2]))
        if match:
            found.append(f"| {match['what']} | {match['figure']} | {match['source']} | `experiment={path.stem}` |")
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("`")[1])
def test_it_is_on_the_page(row):
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


def test_there_are_some():
    assert len(rows()) > 30
