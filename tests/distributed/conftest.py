"""Starting a script as one or several processes of this machine, and collecting what each of them says."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SECONDS = 120
ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="session")
def start():
    """`start(script, folder, *words, processes=n)` -> per rank, the content of `<folder>/rank<n>.json`, which it writes."""

    def run(script, folder, *words, processes):
        folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "paddle.distributed.launch", "--nnodes", "1", "--rank", "0", "--nproc_per_node", str(processes)]
        launcher += ["--master", f"127.0.0.1:{free_port()}", "--log_dir", str(folder / "log")]
        command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), *words]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with (folder / "output.txt").open("w") as output:
            # a session of its own, so that nothing of it outlives the test
            process = subprocess.Popen(command, env=env, start_new_session=True, stdout=output, stderr=output)
            try:
                process.wait(SECONDS)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, 9)
                    process.wait()
        written = [folder / f"rank{rank}.json" for rank in range(processes)]
        if not all(path.is_file() for path in written):
            texts = [
                path.read_text(errors="replace")[-3000:]
                for path in (folder / "output.txt", *(folder / "log").glob("workerlog.*"))
            ]
            raise AssertionError("\n".join([f"exit code {process.returncode}; not every rank finished", *texts]))
        return [json.loads(path.read_text()) for path in written]

    return run
