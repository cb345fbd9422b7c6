"""TAB completes groups, options and keys: what the shell gets is run in a real bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# what bash does on TAB, without a terminal
TAB = """
eval "$(python runners/run.py -sc install=bash)"
for line in "task=pretrain_s" "optim.lr" "model=flant5xl_"; do
  COMP_LINE="python runners/run.py $line" COMP_CWORD=2 COMP_POINT=${#COMP_LINE}
  hydra_bash_completion
  echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes():
    done = subprocess.run(
        ["bash", "-c", TAB],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["task=pretrain_stage1 task=pretrain_stage2", "optim.lr=", "model=flant5xl_vitl"], (
        done.stderr
    )
