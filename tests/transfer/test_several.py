from __future__ import annotations

import threading
import time

import pytest

from blip2x.errors import UserError
from blip2x.transfer.progress import Board, Stopped, TransferProgress
from blip2x.transfer.several import run_several


def fails(error):
    raise error


def test_results_in_the_order_of_the_jobs_and_failures_among_them():
    with Board(print) as board:
        found = run_several({"a": lambda: 1, "b": lambda: fails(UserError("no b")), "c": lambda: 3}, 2, board)
    assert list(found) == ["a", "b", "c"] and (found["a"], str(found["b"]), found["c"]) == (1, "no b", 3)
    assert run_several({}, 2, board) == {}


def test_no_more_than_allowed_at_once():
    running, most = [], []

    def job():
        running.append(1)
        most.append(len(running))
        time.sleep(0.005)
        running.pop()

    with Board(print) as board:
        run_several(dict.fromkeys(range(12), job), 3, board)
    assert max(most) <= 3 and len(most) == 12


def test_a_bug_stops_all():
    begun, stopped = threading.Event(), threading.Event()

    def long(board):
        begun.set()
        with TransferProgress("x", None, board) as progress:
            try:
                while True:
                    progress.at(1, None)
                    time.sleep(0.001)
            except Stopped:
                stopped.set()
                raise

    def bug():
        begun.wait(5)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Board(print) as board:
        run_several({"long": lambda: long(board), "bug": bug}, 2, board)
    assert stopped.wait(5)


def test_a_terminal_gets_a_bar_for_each(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with Board() as board:
        for name in ("one.zip", "two.zip"):
            with TransferProgress(name, None, board) as progress:
                progress.begin("http://x", 0, 100)
                progress.at(50, 100)
                progress.unpack(100)
        board.say("a line")
    said = capsys.readouterr().err
    assert "one.zip" in said and "two.zip, unpacking" in said and "a line" in said
