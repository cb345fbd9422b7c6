"""Loading takes the model's memory and the largest stored tensor's: the peak is measured in a process of its own."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from blip2x.engine.checkpoint import write_checkpoint
from blip2x.models.weights.stored import StoredTensor

MIB = 2**20
COUNT, ROWS, COLUMNS = 12, 2048, 4096  # a tensor is 16 MiB in bfloat16 and 32 MiB in float32, in which the model computes
MODEL = COUNT * ROWS * COLUMNS * 4
# What else may grow: Python's own objects, code that is used for the first time, and NumPy's buffers, which convert in pieces
# of some KiB; measured are 6 MiB less than the model, as loading uses again what the imports have left. One copy of a tensor
# in float32 would be 32 MiB more.
CONSTANT = 16 * MIB

LOAD = """
import sys
from blip2x.startup import prepare_process
prepare_process()
import paddle
from paddle import nn
from blip2x.models.weights.checkpoint import fill, load_checkpoint
from blip2x.models.weights.tensor_files import open_tensors

def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

how, path, count, rows, columns = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
paddle.ones([2, 2]).sum()  # what paddle takes for itself
with paddle.LazyGuard():
    model = nn.LayerDict({"vision": nn.LayerList([nn.Linear(rows, columns, bias_attr=False) for _ in range(count)])})
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = kib("VmHWM")
report = load_checkpoint(path, model) if how == "checkpoint" else fill(model, open_tensors(path), path)
print(len(report.loaded), (kib("VmHWM") - before) * 1024, (kib("VmRSS") - before) * 1024)
assert float(model["vision"][count - 1].weight[-1, -1]) == count
"""


def array(index: int) -> np.ndarray:
    return np.full((ROWS, COLUMNS), index + 1, dtype=ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    tensors = {
        f"vision.{i}.weight": StoredTensor(str(i), (ROWS, COLUMNS), np.dtype(ml_dtypes.bfloat16), lambda i=i: array(i))
        for i in range(COUNT)
    }
    folder = tmp_path_factory.mktemp("memory") / "c"
    frozen = {"names": [], "origin": {}}
    return write_checkpoint(folder, tensors, kind="k", step=0, extra={}, tokenizers={}, frozen=frozen)


def peak(how: str, path: Path) -> tuple[int, int]:
    """Bytes that loading added: at most, and in the end."""
    command = [sys.executable, "-c", LOAD, how, str(path), *map(str, (COUNT, ROWS, COLUMNS))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, most, last = map(int, done.stdout.split())
    assert loaded == COUNT
    return most, last


@pytest.mark.parametrize("how", ["checkpoint", "torch", "paddle"])
def test_peak_is_the_model_and_the_largest_stored_tensor(how, checkpoint, torch, tmp_path):
    path, largest = checkpoint, ROWS * COLUMNS * 2
    if how == "torch":  # in float32, in which nothing has to be converted
        path, largest = tmp_path / "pytorch_model.bin", ROWS * COLUMNS * 4
        torch.save({f"vision.{i}.weight": torch.tensor(array(i).astype("f4")) for i in range(COUNT)}, path)
    if how == "paddle":  # as paddle.save writes, bfloat16 as whole numbers
        path = tmp_path / "model_state.pdparams"
        path.write_bytes(pickle.dumps({f"vision.{i}.weight": array(i).view("u2") for i in range(COUNT)}, protocol=4))
    most, last = peak(how, path)
    assert MODEL - CONSTANT < most < MODEL + largest + CONSTANT
    assert last < MODEL + CONSTANT  # no mapping stays
