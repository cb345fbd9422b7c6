"""A whole command on a real terminal: what it shows, and how it leaves it when Ctrl-C is pressed."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from blip2x.errors import Interrupted

ROOT = Path(__file__).parents[2]


def test_ctrl_c_saves_and_leaves_the_terminal_as_it_was(tmp_path):
    words = ["task=pretrain_vision", "task.max_steps=100000", "task.max_epochs=null", "task.batch_size=2", "task.log_every=1"]
    words += ["dataset.train_scenes=64", "dataset.test_scenes=12", "optim.warmup_steps=0", f"paths.outputs={tmp_path}"]
    terminal, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "runners/run.py", *words, "run_name=r"],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "70", "LINES": "24"},
        stdin=own,
        stdout=own,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(own), os.O_RDWR)),  # its terminal, whose Ctrl-C it gets
    )
    os.close(own)
    said, pressed = "", False
    try:
        while part := os.read(terminal, 65536).decode(errors="replace"):
            said += part
            if not pressed and "samples/s" in said:
                pressed = True
                os.write(terminal, b"\x03")
    except OSError:  # how Linux tells that nobody has it open any more
        pass
    os.close(terminal)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == Interrupted.EXIT_CODE
    assert errors.count("\n") == 1 and errors.startswith("interrupted: pretrain_vision: SIGINT; saved at step ")
    assert "\x1b[?25l" in said and said.rpartition("\x1b[?25")[2].startswith("h")  # the cursor was hidden, and is shown
    for what in ("loss", "data wait", "memory", "left"):
        assert what in said
