"""Odd characters, each in a text that has nothing else."""

from __future__ import annotations

import pytest

from blip2x.data.audit.counts import visible
from blip2x.data.audit.texts import TextFacts, odd_kinds

ODD = {
    "a bell\x07": {"control characters"},
    "two\nlines": {"control characters"},
    "a caf\ufffd": {"replacement characters"},
    "a cafÃ©": {"mojibake"},
    "the catâ€™s tail": {"mojibake"},
    "the cat\xe2\x80\x99s tail": {"mojibake", "control characters"},  # the same, as Latin-1
    "zero\u200bwidth": {"invisible characters"},
    "private \ue000": {"unassigned characters"},
    "no\xa0break": {"unusual blanks"},
    "fire \U0001f525": {"symbols"},
    "a <br/> b": {"HTML"},
    "salt &amp; pepper": {"HTML"},
    "from HTTP://a.b": {"web addresses"},
    "www.a.com": {"web addresses"},
    "кот": {"Cyrillic letters"},
    "猫 and ねこ": {"CJK letters", "Hiragana letters"},
    "γάτα": {"Greek letters"},
}
PLAIN = [
    "a cat on a sofa",
    "A café in Besançon, señor: “naïve” 5 < 6 & 7 > 3",
    "Łódź, Đà Nẵng",
    "fish & chips; 20 €",
    "25 µm, 1ª",
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text(text):
    assert odd_kinds(text) == ODD[text]


@pytest.mark.parametrize("text", PLAIN, ids=ascii)
def test_plain_text(text):
    assert odd_kinds(text) == set()


def test_examples_show_what_cannot_be_seen_and_are_short():
    assert visible("a\x07b\u200bc é") == "a\\x07b\\u200bc é"
    assert visible("x" * 500) == "x" * 200 + "..."


@pytest.mark.parametrize(
    ("text", "captions", "found"),
    [
        ("...", True, "empty"),
        (" \n", True, "empty"),
        ("???", True, "wordless"),  # is left of a caption that is cleaned
        ("\U0001f525", True, "wordless"),
        ("", False, "empty"),
        ("...", False, "wordless"),
        ("7", True, None),
        ("\u732b", True, None),
    ],
    ids=ascii,
)
def test_texts_of_which_nothing_is_left_and_texts_without_a_word(text, captions, found):
    facts = TextFacts({}, limit=12, captions=captions)
    facts.add(text, "a.png")
    figures = facts.figures()
    assert {name for name in ("empty", "wordless") if figures[name]["count"]} == ({found} if found else set())
