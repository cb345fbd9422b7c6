"""A run in a temporary folder, whose console writes into a string."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.parallel.context import Context


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def run(tmp_path, console):
    return Run(tmp_path, tmp_path, "s", Context(), console, Loggers())
