"""Progress: plain lines now and then where there is no terminal, one live picture where there is one."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import textwrap

import pytest
from rich.console import Console

from blip2x.engine import progress
from blip2x.engine.progress import ProgressBar, display_of, show_captions, show_place

LINE = {
    "lr": 1e-4,
    "lr/vision_first": 1e-6,
    "loss": 2.0,
    "itc": 1.5,
    "grad_norm": 0.5,
    "samples_per_second": 40.0,
    "tokens_per_second": 12345.6,
    "data_wait": 0.034,
    "data_wait_seconds": 0.2,
    "memory_gb": 1.25,
    "seconds": 9.0,
}


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


def terminal(width: int = 200, **options) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, force_interactive=True, **options)


def picture(console: Console) -> list[str]:
    """The rows that were drawn last."""
    return console.file.getvalue().split("\x1b[2K")[-1].splitlines()


def test_lines_are_seconds_apart_and_the_last_one_always_comes(clock, console):
    with ProgressBar(console, "train", 4) as bar:
        for second in range(4):
            clock.now += 3
            bar.advance(6, {"loss": second} if second % 2 else None)
    assert shown(console) == [
        "train 2/4 samples_per_second=2 seconds_left=6 loss=1",  # 6 s after the start
        "train 4/4 samples_per_second=2 seconds_left=0 loss=3",
        "train 4/4 samples_per_second=2 seconds_left=0 loss=3",
    ]


def test_time_left_is_that_of_the_steps_made_here(clock, console):
    with ProgressBar(console, "s", 10, unit="images", start=8) as bar:
        clock.now += 7
        bar.advance(1)
    assert shown(console)[0] == "s 9/10 images_per_second=0.143 seconds_left=7"


def test_plain_lines_say_what_the_picture_shows(clock, console):
    show_place(console, 3, 6)
    with ProgressBar(console, "[train]", 2) as bar:  # square brackets are no markup
        bar.advance(1, LINE)
        bar.validated({"CIDEr": 0.5})
        assert not show_captions(console, ["a.png: a dog"])  # whoever has them prints them
        bar.advance(1)
    assert shown(console) == [
        "[train] 1/2 validation CIDEr=0.5",
        "[train] 2/2 stage=3/6 samples_per_second=40 seconds_left=0 lr=0.0001 lr/vision_first=1e-06 loss=2 itc=1.5 "
        "grad_norm=0.5 tokens_per_second=1.235e+04 data_wait=0.034 memory_gb=1.25",
    ]


def test_nothing_done_yet_and_nothing_to_do(clock, console):
    with ProgressBar(console, "empty", 0):
        pass
    assert shown(console) == ["empty 0/0 samples_per_second=0 seconds_left=0"]


def test_an_error_is_not_followed_by_a_line(console):
    with pytest.raises(KeyError), ProgressBar(console, "s", 2):
        raise KeyError
    assert shown(console) == []


def test_picture_of_a_training(clock):
    console = terminal(no_color=True)
    show_place(console, 3, 6)
    with ProgressBar(console, "train", 4) as bar:
        for loss in (3.0, 1.0, 2.0):
            clock.now += 30
            bar.advance(6, {**LINE, "loss": loss})
        bar.validated({"CIDEr": 0.51234, "held_out/CIDEr": 0.25})
        show_captions(console, ["[a].png: a dog\non a mat", "b.png: a cat"])
        clean = [console_text(row) for row in picture(console)]
    assert clean[0].startswith("train (3 of 6) ━━━") and clean[0].endswith("3/4  0:30 left")
    assert clean[1:] == [
        "  loss 2 █▁▅  itc 1.5 ▁▁▁",
        "  40 samples/s  12,346 tokens/s  data wait 3 %  memory 1.25 GB  lr 0.0001  gradient 0.5",
        "  validation at 3  CIDEr 0.5123",
        "  [a].png: a dog on a mat",
        "  b.png: a cat",
    ]


def console_text(row: str) -> str:
    """Without control codes."""
    return "".join(part.partition("m")[2] if index else part for index, part in enumerate(row.split("\x1b["))).rstrip()


@pytest.mark.parametrize("width", [60, 20])
def test_no_row_is_wider_than_the_terminal_nor_are_there_more_than_it_has(clock, width):
    console = terminal(width, height=6, no_color=True)
    with ProgressBar(console, "pretrain_stage1", 400) as bar:
        bar.advance(1, {**LINE, **{f"part{number}": 1.0 for number in range(9)}})
        show_captions(console, ["a.png: " + "long " * 40])
        rows = [console_text(row) for row in picture(console)]
    assert len(rows) == 5 and max(map(len, rows)) <= width
    assert rows[0].startswith("pretrain_stage1 ")


def test_a_terminal_that_became_narrower_has_broken_rows_which_go_away(clock):
    console = terminal(80, no_color=True)
    with ProgressBar(console, "train", 4) as bar:
        bar.advance(1, LINE)  # rows of 75, 23 and 80 columns, and "gradient"
        widths = [len(console_text(row)) for row in picture(console)]
        console.width = 50
        before = len(console.file.getvalue())
        display_of(console).draw(now=True)
        drawn = console.file.getvalue()[before:]
    assert drawn.count("\x1b[1A") == sum(-(-width // 50) for width in widths) - 1


def test_a_loop_inside_another_is_a_row_of_its_picture(clock):
    console = terminal(no_color=True)
    with ProgressBar(console, "train", 2) as outer:
        outer.advance(1)
        with ProgressBar(console, "validate", 3) as inner:
            inner.advance(5)
            assert [console_text(row).split()[0] for row in picture(console)] == ["train", "validate"]
        assert [console_text(row).split()[0] for row in picture(console)] == ["train"]
        outer.advance(1)
    assert console.file.getvalue().count("\x1b[?25l") == 1  # the cursor was hidden once, and is shown again
    assert "\x1b[?25h" in console.file.getvalue().rpartition("train")[2]


def test_pictures_are_drawn_now_and_then(clock):
    console = terminal()
    with ProgressBar(console, "train", 1000) as bar:
        for _ in range(1000):
            clock.now += 0.001
            bar.advance(1)
        assert 7 <= console.file.getvalue().count("train") <= 9


def test_terminal_gets_a_bar_and_the_error_gets_out():
    console = terminal()
    with pytest.raises(KeyError), ProgressBar(console, "train", 2) as bar:
        bar.advance(3, {"loss": 0.5})
        raise KeyError
    said = console.file.getvalue()
    assert "train" in said and "1/2" in said and "loss" in said and said.rpartition("\x1b[?25")[2].startswith("h")


def test_a_display_that_an_error_left_open_can_be_ended():
    console = terminal()

    def batches():
        with ProgressBar(console, "caption", 2):
            yield 1

    loop = batches()  # as an error holds it
    next(loop)
    display_of(console).end()
    assert "\x1b[?25h" in console.file.getvalue()
    loop.close()
    assert console.file.getvalue().count("\x1b[?25h") == 1


def test_quiet_console_of_the_other_ranks_shows_nothing():
    console = Console(file=io.StringIO(), quiet=True, force_terminal=True)
    with ProgressBar(console, "train", 1) as bar:
        bar.advance(1)
    assert console.file.getvalue() == ""


@pytest.mark.parametrize("options", [{"force_interactive": False}, {"_environ": {"TERM": "dumb"}}])
def test_where_nothing_can_be_drawn_over_there_are_lines(clock, options):
    """A file where FORCE_COLOR asks for colours, or a terminal without control codes."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, **options)
    with ProgressBar(console, "train", 1) as bar:
        bar.advance(1)
    assert shown(console) == ["train 1/1 samples_per_second=1e+09 seconds_left=0"]


PROGRAM = """
import os, sys, warnings
from blip2x.engine.progress import ProgressBar
from blip2x.engine.terminal import terminal
console = terminal(quiet=False)
with ProgressBar(console, "train", 3) as bar:
    bar.advance(2, {"loss": 0.5})
    print("printed")
    warnings.warn("of our own")
    child = os.fork()  # as a loader's worker
    if child == 0:
        print("by a worker")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    bar.advance(2)
    raise KeyboardInterrupt
"""


def test_in_a_real_terminal_what_others_print_is_kept_and_the_cursor_comes_back():
    said = in_terminal(PROGRAM, width=60)
    assert "\x1b[?25l" in said and said.rpartition("\x1b[?25")[2].startswith("h")
    rows = [console_text(row.rpartition("\x1b[2K")[2]) for row in said.splitlines()]
    assert "printed" in rows and any("UserWarning: of our own" in row for row in rows)
    assert "by a worker\r\n" in said and "train" in said.partition("by a worker")[2]  # a picture by the parent alone
    assert "LiveError" not in said and said.rstrip().endswith("KeyboardInterrupt")


def in_terminal(program: str, width: int) -> str:
    """What `program` writes to a terminal that is so wide."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(width)}
        os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(program)])
    said = b""
    try:
        while part := os.read(terminal, 65536):
            said += part
    except OSError:  # how Linux tells that it is closed
        pass
    os.close(terminal)
    os.waitpid(child, 0)
    return said.decode()
