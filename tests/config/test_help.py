"""The help names every option in the words of its file."""

from __future__ import annotations

import re

import pytest

from blip2x.config.compose import CONF_FOLDER
from blip2x.config.help import help_text

GROUPS = {path.name for path in CONF_FOLDER.iterdir() if path.is_dir()} - {"recipe"}  # recipes choose themselves


def lines() -> list[str]:
    return help_text(120).splitlines()


def test_every_group_and_option_is_there_with_a_sentence():
    headings = {line.split("=")[0]: index for index, line in enumerate(lines()) if re.match(r"\w+= ", line)}
    assert set(headings) == GROUPS
    for group, start in headings.items():
        end = lines().index("", start)
        shown = {
            line[4:].split()[0] for line in lines()[start + 1 : end] if "/" not in line.split("=")[0] and len(line.split()) > 2
        }
        assert shown == {path.stem for path in (CONF_FOLDER / group).glob("*.yaml")}, group


def test_parts_of_the_model_are_listed():
    assert "    model/vision= clip_vit_l, eva_vit_g, small_vit, tiny_vit" in lines()


def test_the_defaults_are_marked():
    marked = [line.split()[1] for line in lines() if line.startswith("  * ")]
    assert marked == ["pipeline", "tiny_opt", "digits", "single", "fp32", "none", "default", "recipe"]


def test_a_command_is_left_out_of_the_sentence():
    assert any(re.fullmatch(r"    predict +Describe any pictures", line) for line in lines())


@pytest.mark.parametrize("width", [80, 120, 200])
def test_options_fit_the_terminal(width):
    assert max(map(len, help_text(width).split("\n\n", 3)[3].split("Every key")[0].splitlines())) <= width


def test_a_narrow_terminal_still_gets_words():
    assert "vqa_zeroshot" in help_text(10)
