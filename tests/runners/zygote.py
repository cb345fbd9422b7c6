"""Runs on demand: a process that has imported paddle once and forks for each command it reads, so that 20 starts are quick.

It prints "ready", then the process id of each fork and, when that has ended, its exit status (minus the signal's number where
it was killed).
"""

import json
import os
import sys
import traceback
from pathlib import Path

from blip2x.startup import prepare_process

prepare_process(threads=1)

from blip2x.config.compose import compose_config
from blip2x.engine import fit  # noqa: F401  # what takes long; no operation: threads do not survive a fork
from blip2x.errors import Interrupted
from blip2x.tasks import pretrain_stage1  # noqa: F401
from blip2x.tasks.common.launch import launch


def run(words, output):
    sys.stdout = sys.stderr = Path(output).open("a", buffering=1)  # noqa: SIM115  # until the process ends
    try:
        launch(compose_config(words), ["x"])
        code = 0
    except Interrupted as stop:
        print(stop)
        code = stop.EXIT_CODE
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


print("ready", flush=True)
for line in sys.stdin:
    words, output = json.loads(line)
    child = os.fork()
    if not child:
        run(words, output)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
