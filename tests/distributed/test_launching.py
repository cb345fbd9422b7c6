"""How several processes come to know of each other, and what is left of them when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.conftest import free_port

ROOT = Path(__file__).parents[2]
WORDS = ["task=pretrain_vision", "parallelism=dp", "run_name=r", "dataset.train_scenes=64", "dataset.test_scenes=12"]
WORDS += ["optim.warmup_steps=0", "task.batch_size=4", "task.max_epochs=null", "task.log_every=1"]
SECONDS = 100

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture
def begin(tmp_path):
    """`begin(name, *words, **variables)` starts python, until the test ends; its output goes to `<name>.txt`."""
    begun = []

    def run(name, *words, **variables):
        with (tmp_path / f"{name}.txt").open("w") as output:
            env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **variables}
            # a session of its own, so that nothing of it outlives the test
            command = [sys.executable, *map(str, words), f"paths.outputs={tmp_path}"]
            process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
        begun.append(process)
        return process

    yield run
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_two_launchers_as_on_two_machines(begin, tmp_path):
    """Each starts one process; both train, to the same weights, and write one run folder."""
    master = f"127.0.0.1:{free_port()}"
    nodes = []
    for node in range(2):
        launcher = ["-m", "paddle.distributed.launch", "--master", master, "--nnodes", "2", "--nproc_per_node", "1"]
        launcher += ["--rank", node, "--log_dir", tmp_path / f"log{node}"]
        program = [ROOT / "tests/distributed/runner.py", tmp_path, *WORDS, "task.max_steps=2"]
        nodes.append(begin(f"node{node}", *launcher, *program))
    assert [node.wait(SECONDS) for node in nodes] == [0, 0], (tmp_path / "node0.txt").read_text()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and first["code"] == 0 and len(first["weights"]) == 1
    assert [path.parent.name for path in tmp_path.glob("*/config.yaml")] == ["r"]


def test_tasks_of_slurm_find_each_other_and_notice_when_one_is_killed(begin, tmp_path):
    """Without a launcher, which would end the others; nothing but the broken connection tells rank 0."""
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(free_port()), "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"PADDLE_MASTER": f"127.0.0.1:{free_port()}"}
    tasks = [
        begin(
            f"task{rank}",
            ROOT / "runners/run.py",
            *WORDS,
            "task.max_steps=100000",
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            **step,
        )
        for rank in range(2)
    ]
    metrics, until = tmp_path / "r/metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        said = "".join((tmp_path / f"task{rank}.txt").read_text()[-3000:] for rank in range(2))
        assert time.monotonic() < until and all(task.poll() is None for task in tasks), said
        time.sleep(0.1)
    tasks[1].kill()
    code = tasks[0].wait(SECONDS)
    said = (tmp_path / "task0.txt").read_text()
    assert code == 2, said
    assert said.count("error: ") == 1 and "error: rank 0 of 2 can no longer reach another rank" in said
    assert "Traceback" not in said and "terminate called" not in said


def test_a_job_of_submitit_that_fails_is_said_to_fail(begin, tmp_path):
    """Its process is another one, whose failure must not be lost; the sweep's other job is not harmed."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    words = [word for word in WORDS if not word.startswith(("run_name", "task.batch_size"))]
    words += ["parallelism=single", "task.max_steps=2", "task.batch_size=4,99", "sweep=s", "hydra/launcher=submitit_local"]
    sweep = begin("sweep", ROOT / "runners/run.py", "-m", *words)
    assert sweep.wait(SECONDS) == 2
    assert "do not fill one batch" in (tmp_path / "sweep.txt").read_text()
    good, bad = (tmp_path / "sweeps/s" / f"task.batch_size={size}" for size in (4, 99))
    assert (good / "results.json").is_file()
    status = json.loads((bad / "status.json").read_text())
    assert status["state"] == "failed" and "do not fill one batch" in status["error"]
