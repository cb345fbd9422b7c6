"""One rank of `runners/run.py`: `runner.py <folder> <words>`; writes its exit code and its weights' digest to rank<n>.json."""

import hashlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process()

import runpy
import signal

from blip2x.engine import losses
from blip2x.engine.fit import Training
from blip2x.parallel import leave

weights = []
fit = Training.fit
record = losses.LossRecord


def watched(training):
    result = fit(training)
    values = [parameter.numpy().tobytes() for parameter in training.objective.parameters()]
    weights.append(hashlib.sha256(b"".join(values)).hexdigest())
    return result


def stopped(where, step):
    """This rank gets SIGTERM in the middle of that optimizer step, and no other rank."""
    if os.environ.get("PADDLE_TRAINER_ID") != where:
        return
    add = record.add

    def add_and_stop(self, number, parts):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        add(self, number, parts)

    record.add = add_and_stop


def main(folder):
    Training.fit = watched
    leave.leaving_quietly = nullcontext  # as the exit code is to be written down first
    if "STOP_RANK" in os.environ:
        stopped(os.environ["STOP_RANK"], int(os.environ["STOP_STEP"]))
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
