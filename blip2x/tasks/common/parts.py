"""What is done of a long run, line by line as its batches finish, so that a run that is killed loses a batch at most."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from blip2x.engine.folders import append_whole
from blip2x.engine.run import Run

_FOLDER = "partial"  # of the run's


class Parts:
    """A file per data rank below the run's folder. What rank 0 sees counts: a rank with a disk of its own does its part anew.

    Args:
        run: the task's run.
    """

    def __init__(self, run: Run):
        self._run, self._folder = run, run.folder / _FOLDER

    def read(self) -> list[dict[str, Any]]:
        """The rows of all ranks of the runs before, on every rank; all must call it, before any adds."""
        return self._run.context.on_main(lambda: self._rows() if self._run.goes_on else [])

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, which JSON can hold; all of them or, where the disk is full, none."""
        context = self._run.context
        if context.tensor.rank > 0:  # another rank has the same rows
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        append_whole(self._folder / f"{context.data_rank}.jsonl", f"\n{lines}")  # whoever was killed left half a line

    def remove(self) -> None:
        """Nothing is left to go on with; all ranks must call it, when the rows are elsewhere."""
        self._run.context.barrier()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line) if line else None
                except ValueError:
                    continue
                if isinstance(row, dict):
                    rows.append(row)
        return rows
