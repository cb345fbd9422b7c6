"""Progress: plain lines now and then where there is no terminal, a live bar where there is one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from blip2x.engine import progress
from blip2x.engine.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def shown(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_lines_are_seconds_apart_and_the_last_one_always_comes(clock, console):
    with ProgressBar(console, "train", 4) as bar:
        for second in range(4):
            clock.now += 3
            bar.advance(6, f"loss [{second}]" if second % 2 else None)
    assert shown(console) == [
        "train 2/4  2 samples/s  6 s left  loss [1]",  # 6 s after the start; square brackets are no markup
        "train 4/4  2 samples/s  0 s left  loss [3]",
        "train 4/4  2 samples/s  0 s left  loss [3]",
    ]


def test_time_left_is_that_of_the_steps_made_here(clock, console):
    with ProgressBar(console, "s", 10, unit="images", start=8) as bar:
        clock.now += 7
        bar.advance(1)
    assert shown(console)[0] == "s 9/10  0.143 images/s  7 s left"


def test_nothing_done_yet_and_nothing_to_do(clock, console):
    with ProgressBar(console, "empty", 0):
        pass
    assert shown(console) == ["empty 0/0  0 samples/s  0 s left"]


def test_an_error_is_not_followed_by_a_line(console):
    with pytest.raises(KeyError), ProgressBar(console, "s", 2):
        raise KeyError
    assert shown(console) == []


def test_terminal_gets_a_bar_and_the_error_gets_out():
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with pytest.raises(KeyError), ProgressBar(console, "train", 2) as bar:
        bar.advance(3, "loss 0.5")
        raise KeyError
    assert "train" in console.file.getvalue() and "1/2" in console.file.getvalue() and "loss 0.5" in console.file.getvalue()


def test_quiet_console_of_the_other_ranks_shows_nothing():
    console = Console(file=io.StringIO(), quiet=True, force_terminal=True)
    with ProgressBar(console, "train", 1) as bar:
        bar.advance(1)
    assert console.file.getvalue() == ""
