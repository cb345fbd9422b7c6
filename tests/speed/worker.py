"""A process that has prepared one way of one row and runs it whenever it is told to.

Each line that it reads is "run"; each that it writes is a JSON object: first {"versions", "answer"}, then {"seconds", "answer"}
for each run, and {"peak_mib"} when its input ends; {"error"} in place of any of these. What libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from blip2x.engine.resident import peak_mib  # needs neither paddle nor torch

Answer = dict[str, Any]  # name -> texts, or an array
Prepared = tuple[Callable[[], "Answer | None"], "Answer | None"]  # what a run calls, and what is known before the first


class Inputs(ABC):
    """What made.py left in `folder`: settings, and arrays as the tensors of one side."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.sizes = self.meta["sizes"]
        self._arrays = np.load(folder / "inputs.npz")

    @abstractmethod
    def tensor(self, array: np.ndarray) -> Any:
        """The side's own."""

    def array(self, name: str) -> Any:
        """One of them."""
        return self.tensor(self._arrays[name])

    def batch(self, stage: str) -> dict[str, Any]:
        """All that are named after `stage`."""
        names = [name for name in self._arrays.files if name.startswith(f"{stage}.")]
        return {name.partition(".")[2]: self.array(name) for name in names}


def arguments() -> argparse.Namespace:
    """What compare.py hands to both sides."""
    parser = argparse.ArgumentParser()
    for name in ("row", "way", "folder"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def serve(args: argparse.Namespace, prepare: Callable[[str, str, Path], Prepared], versions: dict[str, str]) -> None:
    """Prepare, and run as often as asked."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    number = 0

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    def stored(answer: Answer | None) -> dict[str, Any] | None:
        """Texts as they are, arrays by the file that has them."""
        nonlocal number
        if answer is None or "texts" in answer:
            return answer
        number += 1
        path = Path(args.folder, "answers", f"{args.row}-{args.way}-{number}.npz")
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **answer)
        return {"file": str(path)}

    try:
        run, answer = prepare(args.row, args.way, Path(args.folder))
        send({"versions": versions, "answer": stored(answer)})
        for _ in sys.stdin:
            gc.collect()
            started = time.perf_counter()
            answer = run()
            send({"seconds": time.perf_counter() - started, "answer": stored(answer)})
        send({"peak_mib": peak_mib()})
    except Exception as error:
        traceback.print_exc()
        send({"error": f"{type(error).__name__}: {error}"})
