"""log.txt has what the terminal has, without its colours and movements."""

from __future__ import annotations

import io
import warnings

import pytest
from rich.console import Console
from rich.live import Live
from rich.progress import Progress
from rich.table import Table

from blip2x.engine import run_log
from blip2x.engine.run_log import RunLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.txt"


def test_prints_are_there_at_once_and_plain(path, console):
    log = RunLog(path, console, "run.py a")
    console.print("[bold]one[/] [red]two[/] :smile:", "x" * 300, soft_wrap=True)
    console.print("warning: [a]", style="yellow", markup=False)
    first = path.read_text().split("\n")
    assert first[0].endswith(" UTC $ run.py a") and first[1].startswith("one two ") and first[1].endswith("x" * 300)
    assert first[2:] == ["warning: [a]", ""]
    table = Table("head")
    table.add_row("cell")
    console.print(table)
    assert "cell" in path.read_text() and "\x1b" not in path.read_text()
    log.close()
    console.print("later")
    assert "later" not in path.read_text() and "later" in console.file.getvalue()


def test_a_quiet_console_s_words_are_kept(path):
    console = Console(file=io.StringIO(), quiet=True)
    RunLog(path, console, "")
    console.print("said")
    assert "said\n" in path.read_text() and console.file.getvalue() == ""


def test_a_live_display_redraws_and_the_log_has_only_what_is_printed_above_it(path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    log = RunLog(path, console, "")
    with Progress(console=console, auto_refresh=False) as progress:
        task = progress.add_task("steps", total=3)
        for _ in range(3):
            progress.advance(task)
            progress.refresh()
        console.print("above")
    with Live("bar", console=console, auto_refresh=False):
        log.close()  # while it is on
        console.print("after")
    assert "steps" in console.file.getvalue()
    said = path.read_text()
    assert "above\n" in said and "steps" not in said and "after" not in said


def test_warnings_are_kept_and_still_shown(path, console, capsys):
    before = warnings.showwarning
    log = RunLog(path, console, "")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        assert shown == log._warning
        warnings.warn("take care", stacklevel=1)
    log.close()
    assert "UserWarning: take care" in path.read_text() and warnings.showwarning is before


def test_a_full_disk_is_said_once_and_stops_nothing(path, console, monkeypatch):
    log = RunLog(path, console, "")

    def full(*arguments):
        raise OSError("no space")

    monkeypatch.setattr(run_log, "append_whole", full)
    console.print("a")
    console.print("b")
    log.close()
    said = console.file.getvalue()
    assert said.count("log.txt lacks lines: no space") == 1 and "a\n" in said and "b\n" in said
