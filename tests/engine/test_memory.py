import subprocess
import sys
from pathlib import Path

import numpy as np

from blip2x.engine import memory
from blip2x.engine.memory import begin_peak, peak_memory_gb, peak_memory_mib


def test_peak_is_in_mebibytes_and_stays_when_memory_is_given_back():
    before = peak_memory_mib()
    block = np.ones(64 * 2**20 // 8)
    used = peak_memory_mib()
    del block
    assert 10 < before < 1e6 and before <= used <= peak_memory_mib() < before + 200


def test_a_large_program_that_started_this_one_does_not_count():
    root = Path(__file__).resolve().parents[2]
    inner = "from blip2x.engine.resident import peak_mib; print(peak_mib())"
    code = f"import os, sys; large = bytearray(b'x' * (200 << 20)); os.execv(sys.executable, [sys.executable, '-c', {inner!r}])"
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 1 < float(found.stdout) < 150


def test_only_the_first_job_of_a_process_knows_its_peak_on_a_cpu(monkeypatch):
    monkeypatch.setattr(memory, "_jobs", 0)
    begin_peak("cpu")
    assert 0.01 < peak_memory_gb("cpu") < 1000
    begin_peak("cpu")
    assert peak_memory_gb("cpu") is None
