"""Where a run prints: what quiet mode lets through."""

from __future__ import annotations

import sys

from rich.table import Table

from blip2x.engine.progress import ProgressBar
from blip2x.engine.run_log import RunLog
from blip2x.engine.terminal import terminal


def test_quiet_leaves_warnings_and_tables(capsys):
    console = terminal(quiet=True)
    table = Table()
    table.add_row("CIDEr")
    console.print("blip2x caption", style="bold")
    console.print("warning: two images are missing", style="yellow")
    console.print(table)
    with ProgressBar(console, "train", 1) as bar:
        bar.advance(1)
    said = capsys.readouterr().out
    assert "two images are missing" in said and "CIDEr" in said
    assert "blip2x" not in said and "train" not in said


def test_quiet_keeps_nothing_from_the_log(tmp_path, capsys):
    console = terminal(quiet=True)
    log = RunLog(tmp_path / "log.txt", console, "x")
    console.print("blip2x caption")
    console.print("warning: two images are missing", style="yellow")
    with ProgressBar(console, "train", 1) as bar:
        bar.advance(1)
    console.print("report: r.html")
    log.close()
    said = [line.split(" ")[0] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said[1:] == ["blip2x", "warning:", "train", "report:"]
    assert capsys.readouterr().out == "warning: two images are missing\n"


def test_quiet_draws_nothing_on_a_terminal_either(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for quiet in (False, True):
        with ProgressBar(terminal(quiet=quiet), "train", 1) as bar:
            bar.advance(1)
        assert ("train" in capsys.readouterr().out) is not quiet


def test_a_file_gets_wide_lines_and_at_most_colours(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = terminal(quiet=False)
    assert console.is_terminal and not console.is_interactive and console.width == 120
    with ProgressBar(console, "train", 1) as bar:
        bar.advance(1)
    assert capsys.readouterr().out.startswith("train 1/1 ")
