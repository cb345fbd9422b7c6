"""Process settings, each looked at in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS") and k != "MKL_DEBUG_CPU_TYPE"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env}, timeout=60)


SHOW = "import os; from blip2x.startup import prepare_process; prepare_process({}); print(os.environ['MKL_NUM_THREADS'])"


def test_threads_are_the_cores_or_what_is_asked_for():
    cores = int(run("import os; print(len(os.sched_getaffinity(0)))").stdout)
    assert int(run(SHOW.format("")).stdout) == cores
    assert int(run(SHOW.format("3")).stdout) == 3


def test_ranks_of_a_node_share_the_cores():
    assert int(run(SHOW.format(""), PADDLE_LOCAL_SIZE="10000").stdout) == 1


def test_too_late_is_an_error_and_twice_is_none():
    late = run("import sys; sys.modules['paddle'] = sys; from blip2x.startup import prepare_process; prepare_process()")
    assert "before paddle is imported" in late.stderr
    twice = run("import sys; from blip2x.startup import prepare_process as p; p(); sys.modules['paddle'] = sys; p()")
    assert twice.returncode == 0, twice.stderr
    other = run("from blip2x.startup import prepare_process as p; p(2); p(3)")
    assert "threads=3, but this process has threads=2" in other.stderr


LOOP = """
import os
from blip2x.startup import prepare_process
prepare_process({threads})
import paddle
import paddle.nn.functional as F
before = len(os.listdir("/proc/self/task"))
F.layer_norm(paddle.ones([64, 64]), 64, paddle.ones([64]), paddle.ones([64]))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_paddle_takes_the_threads_and_prints_nothing():
    for threads in (1, 3):
        done = run(LOOP.format(threads=threads))
        assert done.stderr == "" and int(done.stdout) == threads - 1  # the first is there already


def test_without_paddles_openmp_the_environment_tells_the_threads():
    code = (
        "import os, blip2x.startup as s; s._start_openmp = lambda: {}; s.prepare_process(3); "
        "print(os.environ['OMP_NUM_THREADS'])"
    )
    assert run(code.format(False)).stdout.strip() == "3"
    assert run(code.format(True)).stdout.strip() == "1"  # paddle warns of more


def test_only_the_warnings_of_the_imports_are_silenced():
    code = (
        "import warnings; from blip2x.startup import prepare_process; prepare_process(); "
        "[warnings.warn(text) for text in ('No ccache found. Please', 'Setuptools is replacing distutils.', 'of our own')]"
    )
    assert [line for line in run(code).stderr.splitlines() if "Warning" in line] == ["<string>:1: UserWarning: of our own"]


def test_deprecations_inside_third_parties_stay_silent_whatever_python_is_told():
    code = (
        "import warnings; from blip2x.startup import prepare_process; prepare_process(); "
        "[warnings.warn_explicit('old', kind, name, 1, module=name) for kind in (DeprecationWarning, UserWarning) "
        "for name in ('paddlenlp.utils.pdc_sdk', 'optuna.storages', 'blip2x.api.load')]"
    )
    shown = [line for line in run(code, PYTHONWARNINGS="default").stderr.splitlines() if "Warning" in line]
    assert shown == [
        "blip2x.api.load:1: DeprecationWarning: old",
        "paddlenlp.utils.pdc_sdk:1: UserWarning: old",
        "optuna.storages:1: UserWarning: old",
        "blip2x.api.load:1: UserWarning: old",
    ]


def test_mkl_is_told_the_instruction_set_on_amd():
    code = (
        "import os, blip2x.startup as s; s._is_amd_with_avx2 = lambda: {}; s.prepare_process(); "
        "print(os.environ.get('MKL_DEBUG_CPU_TYPE'))"
    )
    assert run(code.format(True)).stdout.strip() == "5"
    assert run(code.format(False)).stdout.strip() == "None"
