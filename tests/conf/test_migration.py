"""What docs/migration.md tells people to type is something that can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from blip2x.config.compose import compose_dict

PAGE = Path(__file__).resolve().parents[2] / "docs/migration.md"


def commands() -> list[str]:
    """The second column of each table, where it is overrides, and the commands of the page."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("| "):
            cells = re.findall(r"`([^`]+)`", line.split(" | ")[1])
            found += [cell for cell in cells if re.match(r'"?[a-z_.]+=', cell)]
        elif "runners/run.py" in line:
            found += re.findall(r"runners/run\.py ([^`]*=[^`]*)", line)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", [words for words in commands() if "..." not in words])
def test_it_composes(command):
    words = shlex.split(command)
    groups = {word.split("=")[0] for word in words}
    # keys of trainings and of decoding need a task that has them
    task = "caption" if {"task.train", "task.num_beams"} & groups else "pretrain_stage2"
    compose_dict([*([] if groups & {"task", "experiment"} else [f"task={task}"]), *words])


def test_there_are_some():
    assert len(commands()) > 50
