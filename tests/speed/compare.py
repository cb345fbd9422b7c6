"""blip2x beside Hugging Face's transformers and LAVIS's way of doing the same, on PyTorch: seconds, memory, results.

    python tests/speed/compare.py --torch ~/parity/bin/python --model small --out docs/speed.json

It runs in blip2x's environment; --torch is the Python of one with `pip install --group parity`. Random weights are written
once, as Hugging Face's folders, and both sides load these. For each row a process per way loads its model and runs once to warm
up; then the ways take turns, the others waiting, so that whatever else the machine does meets all of them. Starting and loading
is not counted, except in the row that is about it.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.speed.rows import NAMES, OURS, ROWS, SIZES, Row  # noqa: E402

PAUSE = 0.3  # seconds between turns: threads of the libraries go on waiting busily for a moment
LEAST = 3  # repeats
LIMIT = 900.0  # seconds for one answer of a process

Json = dict[str, Any]


class WorkerError(Exception):
    """A process has failed."""


class Worker:
    """A process that goes one way of one row; it has loaded nothing yet when this returns."""

    def __init__(self, row: str, way: str, folder: Path, python: str, threads: int, environment: dict[str, str]):
        side = "ours" if way in OURS else "theirs"
        command = [python, "-m", f"tests.speed.{side}", "--row", row, "--way", way, "--folder", str(folder)]
        own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        own["OMP_NUM_THREADS"] = str(threads)
        self._log = folder / f"{row}-{way}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--threads", str(threads)],
                cwd=ROOT,
                env=environment | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not read any more
                pipe.close()

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def read(self) -> Json:
        """What it says next.

        Raises:
            WorkerError: it has failed, or says nothing for too long.
        """
        if not select.select([self._process.stdout], [], [], LIMIT)[0]:
            raise WorkerError(f"no answer within {LIMIT:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise WorkerError(" ".join(["the process has ended:", *last]))
        message = json.loads(line)
        if "error" in message:
            raise WorkerError(message["error"])
        return message

    def run(self) -> Json:
        """Seconds, and the answer."""
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self.read()

    def end(self) -> Json:
        """The most memory that it had."""
        self._process.stdin.close()
        return self.read()


def measure(name: str, folder: Path, args: argparse.Namespace, environment: dict[str, str]) -> tuple[Json, Json]:
    """One row; and the versions of the libraries. `environment` is what its processes begin with."""
    ways: dict[str, Json] = {way: {} for way in ROWS[name].ways}
    answers, versions = {}, {}
    with ExitStack() as stack:
        workers = {}
        for way in ways:
            python = sys.executable if way in OURS else args.torch
            workers[way] = stack.enter_context(Worker(name, way, folder, python, args.threads, environment))

        def ask(way: str, method: str) -> Json | None:
            """None: that way has failed, now or before."""
            if "error" in ways[way]:
                return None
            try:
                return getattr(workers[way], method)()
            except (WorkerError, OSError) as error:
                workers[way].kill()  # or it would go on beside the others
                ways[way]["error"] = str(error)
                print(f"  {NAMES[way]}: {error}", flush=True)
                return None

        for way in ways:
            if ready := ask(way, "read"):
                versions |= ready["versions"]
                answers[way] = ready["answer"]
        for way in ways:
            time.sleep(PAUSE)
            if warm := ask(way, "run"):
                answers[way] = answers[way] or warm["answer"]
                ways[way]["seconds"] = []
        started = time.monotonic()
        for repeat in range(args.repeats):
            if repeat >= LEAST and time.monotonic() - started > args.seconds:
                break
            for way in ways:
                time.sleep(PAUSE)
                if done := ask(way, "run"):
                    ways[way]["seconds"].append(done["seconds"])
        for way in ways:
            if ended := ask(way, "end"):
                ways[way]["peak_mib"] = round(ended["peak_mib"], 1)
    first = next(iter(ways))
    for way in ways:
        if way != first and answers.get(first) and answers.get(way):
            try:
                ways[way]["compared"] = compared(ROWS[name], answers[first], answers[way])
            except ValueError as error:  # other numbers of texts, other shapes
                ways[way].setdefault("error", f"its results cannot be compared: {error}")
    return {"count": SIZES[args.model].count(name), "ways": ways}, versions


def compared(row: Row, ours: Json, theirs: Json) -> Json:
    """How many texts are the same, or how far numbers are apart, and which was the largest of them."""
    if row.answer == "texts":
        same = sum(one == other for one, other in zip(ours["texts"], theirs["texts"], strict=True))
        words = [len(text.split()) for text in ours["texts"]]
        return {"same": same, "of": len(words), "different": len(set(ours["texts"])), "words": [min(words), max(words)]}
    arrays, others = np.load(ours["file"]), np.load(theirs["file"])
    names = [name for name in arrays.files if name in others.files]  # a stage's parts, where one side tells more of them
    difference = max(float(np.abs(arrays[name] - others[name]).max()) for name in names)
    return {"difference": difference, "largest": max(float(np.abs(arrays[name]).max()) for name in names)}


def said(name: str, row: Json) -> str:
    """A row's ratios, for the terminal."""
    ways = row["ways"]
    first, *others = ways
    if not ways[first].get("seconds"):
        return f"{name}: failed"
    parts = [f"{NAMES[first]} {min(ways[first]['seconds']):.3f} s"]
    for way in others:
        if ways[way].get("seconds"):
            ratio = min(ways[way]["seconds"]) / min(ways[first]["seconds"])
            parts.append(f"{NAMES[way]} {ratio:.2f} times as long {ways[way].get('compared', '')}")
    return f"{name}: {'; '.join(parts)}"


def main() -> None:
    """Measure, and write what was measured after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="Python of an environment with torch and transformers")
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, with commas between")
    parser.add_argument("--out", type=Path, help="where the measurements go (JSON)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=7, help="at most, of each way")
    parser.add_argument("--seconds", type=float, default=40, help=f"for a row; {LEAST} repeats are made in any case")
    args = parser.parse_args()
    rows = args.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"there is no row {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")

    from blip2x.startup import prepare_process

    environment = dict(os.environ)  # as users find it: each side prepares its own processes
    prepare_process(args.threads)
    from blip2x.engine.hardware import hardware
    from blip2x.engine.versions import versions
    from blip2x.parallel.context import Context

    machine = {key: hardware(Context())[key] for key in ("cpu", "usable_cores", "memory_gb", "system")}
    own = {key: versions()[key] for key in ("blip2x", "paddlepaddle", "paddlenlp", "python", "git_commit")}
    words = ["PYTHON" if word == args.torch else word for word in sys.argv[1:]]  # where it is is nobody's business
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "tests/speed/compare.py", *words]),
        "model": args.model,
        "threads": args.threads,
        "machine": machine,
        "load_before": round(os.getloadavg()[0], 2),  # processes that wanted a core, before anything was measured
        "versions": own,
        "rows": {},
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blip2x-speed-") as made:
        folder = Path(made, args.model)
        print(f"writing random weights of {args.model}", flush=True)
        command = [sys.executable, "-m", "tests.speed.made", str(folder), args.model]
        subprocess.run(command, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, check=True)
        for number, name in enumerate(rows, 1):
            record["rows"][name], found = measure(name, folder, args, environment)
            record["versions"] |= found
            passed = time.monotonic() - started
            print(f"[{number}/{len(rows)}, {passed:.0f} s] {said(name, record['rows'][name])}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = [name for name, row in record["rows"].items() if any("error" in way for way in row["ways"].values())]
    if failed:
        sys.exit(f"failed in part: {', '.join(failed)}")


if __name__ == "__main__":
    main()
