"""What docs/migration.md tells people to type is something that can be typed."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from blip2x.config.compose import CONF_FOLDER, compose_dict

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


@cache
def config(*groups: str) -> DictConfig:
    return compose_dict(list(groups))


@pytest.mark.parametrize("command", [words for words in commands() if "..." not in words])
def test_groups_options_and_keys_are_there(command):
    words = [word.split("=", 1) for word in shlex.split(command)]
    # keys of trainings and of decoding need a task that has them
    task = "caption" if {"task.train", "task.num_beams"} & {key for key, _ in words} else "pretrain_stage2"
    composed = config(*[f"{key}={value}" for key, value in words if key in ("task", "parallelism")] or [f"task={task}"])
    for key, value in words:
        if (CONF_FOLDER / key).is_dir():
            assert (CONF_FOLDER / key / f"{value}.yaml").is_file()
        else:
            parent, _, name = f".{key}".rpartition(".")
            assert name in list(OmegaConf.select(composed, parent[1:]) if parent else composed)  # also where no value is


def test_there_are_some():
    assert len(commands()) > 50
