"""README.md and README_zh.md have the same commands, the same code, the same links and figures, and link to what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BOTH = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")]


def commands(text: str) -> list[str]:
    """Lines of code without the remarks behind them."""
    found = [
        line[4:]
        for line in text.splitlines()
        if line.startswith("    ") and re.match(r"\s*(pip|python|\[?{|model|dataset)", line)
    ]
    return [re.split(r"\s{2,}#", line)[0].rstrip() for line in found]


def test_the_commands_are_the_same():
    english, chinese = map(commands, BOTH)
    assert english == chinese and len(english) > 30


def test_the_fenced_code_is_the_same():
    english, chinese = (re.findall(r"```.*?```", text, re.DOTALL) for text in BOTH)
    assert english == chinese and english


def test_links_and_sections_come_in_the_same_order():
    english, chinese = (re.findall(r"\]\((?!README)([^)]+)\)", text) for text in BOTH)
    assert english == chinese
    assert len({text.count("\n## ") for text in BOTH}) == 1


def test_tables_have_the_same_figures():
    english, chinese = (
        [re.findall(r"\d[\d.,]*\d", line) for line in text.splitlines() if line.startswith("|")] for text in BOTH
    )
    assert english == chinese


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    missing = [path for path, _ in links if path and not (page.parent / path).exists()]
    assert missing == []
    for path, anchor in links:
        if anchor:
            target = page.parent / path if path else page
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
