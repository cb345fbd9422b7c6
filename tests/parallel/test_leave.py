import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from blip2x.parallel.leave import leaving_quietly
atexit.register(lambda: print("shut down"))
with leaving_quietly():
    print("work")
    {end}
print("behind")
"""


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("sys.exit(75)", 75), ("sys.exit()", 0), ("sys.exit('no')", 1)])
def test_one_of_several_processes_ends_at_once_with_its_code(end, code):
    environment = {"PADDLE_TRAINERS_NUM": "2", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end=end)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "work\n")


def test_a_process_alone_goes_on():
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(end="pass")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "work\nbehind\nshut down\n")
