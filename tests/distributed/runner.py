"""One rank of `runners/run.py`: `runner.py <folder> <words>`; writes its exit code and its weights' digest to rank<n>.json."""

import hashlib
import json
import os
import sys
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process()

import runpy

from blip2x.tasks.common import train as training

weights = []
fit = training.fit


def watched(objective, *arguments, **named):
    result = fit(objective, *arguments, **named)
    values = [parameter.numpy().tobytes() for parameter in objective.parameters()]
    weights.append(hashlib.sha256(b"".join(values)).hexdigest())
    return result


def main(folder):
    training.fit = watched
    try:
        runpy.run_path(str(Path(__file__).parents[2] / "runners" / "run.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    rank = os.environ.get("PADDLE_TRAINER_ID", "0")
    partial = folder / f".rank{rank}.json"
    partial.write_text(json.dumps({"code": code, "weights": weights}))
    partial.rename(folder / f"rank{rank}.json")
    os._exit(code)  # now and then paddle's gloo crashes while the interpreter shuts down, after everything is done


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
