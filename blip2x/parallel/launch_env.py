"""What a process learns of the others from its environment, before paddle is imported.

`python -m paddle.distributed.launch` tells each process its place in PADDLE_* variables, Slurm in variables of its own; here
the former are made of the latter, so that `srun python runners/run.py` needs no launcher.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from blip2x.errors import UserError

FIRST_PORT, PORTS = 20_000, 12_000  # below what Linux gives to outgoing connections
_RESERVED_STEPS = 0xFFFFFFF0  # Slurm's numbers from here on are of batch scripts, shells and the like, which are no tasks
_RANGE = r"\d+(?:-\d+)?"
_NAMES = rf"(?:\[{_RANGE}(?:,{_RANGE})*\]|[^,\[\]\s])+"  # of hosts: node[03-05,07]
_INSTEAD = "start with python -m paddle.distributed.launch instead"


def join_slurm(environ: MutableMapping[str, str], cores: int) -> None:
    """Set paddle's variables where `srun` (or submitit, which calls it) started this process as one of several tasks.

    Nothing is done where paddle's launcher started it. A PADDLE_MASTER that is set ("host:port") is kept.

    Args:
        environ: of this process; it is changed.
        cores: that this process may use.

    Raises:
        UserError: a variable of Slurm that is needed is absent, cannot be read or contradicts another one.
    """
    if "PADDLE_TRAINERS_NUM" in environ or not _is_task(environ):
        return
    size, rank, local = (_number(environ, name) for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"))
    if size == 1:
        return
    hosts = expand_hosts(_value(environ, "SLURM_STEP_NODELIST"))
    counts = expand_counts(_value(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if len(hosts) != len(counts) or sum(counts) != size or rank >= size:
        raise UserError(f"Slurm counts {counts} tasks on {hosts}, but this is task {rank} of {size}; {_INSTEAD}")
    port = rendezvous_port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"))
    # the ranks meet at the master; these say how many machines there are, which fleet counts
    endpoints = [f"{host}:{port + 1 + place}" for host, count in zip(hosts, counts, strict=True) for place in range(count)]
    bound = cores < int(environ.get("SLURM_CPUS_ON_NODE", "0"))  # each task to cores of its own
    environ.setdefault("PADDLE_MASTER", f"{hosts[0]}:{port}")
    environ |= {
        "PADDLE_TRAINERS_NUM": str(size),
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
        "PADDLE_CURRENT_ENDPOINT": endpoints[rank],
        "PADDLE_NNODES": str(len(hosts)),
        "PADDLE_LOCAL_RANK": str(local),
        "PADDLE_RANK_IN_NODE": str(local),
        "PADDLE_LOCAL_SIZE": "1" if bound else str(counts[_number(environ, "SLURM_NODEID")]),  # they share this one's cores
        "FLAGS_selected_gpus": str(card(local, environ.get("CUDA_VISIBLE_DEVICES"))),
    }


def expand_hosts(text: str) -> list[str]:
    """Slurm's short form of host names: "a1,b[03-05,07]" -> a1, b03, b04, b05, b07.

    Raises:
        UserError: it cannot be read.
    """
    if not re.fullmatch(rf"{_NAMES}(?:,{_NAMES})*", text):
        raise UserError(f"the host names {text!r} that Slurm gives cannot be read; {_INSTEAD}")
    return [host for part in re.findall(_NAMES, text) for host in _expand(part)]


def _expand(text: str) -> list[str]:
    found = re.fullmatch(r"([^\[]*)\[(.*?)\](.*)", text)
    if not found:
        return [text]
    before, ranges, after = found.groups()
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [before + number + rest for number in numbers for rest in _expand(after)]


def expand_counts(text: str) -> list[int]:
    """Slurm's short form of a count per host: "8(x2),4" -> 8, 8, 4.

    Raises:
        UserError: it cannot be read.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise UserError(f"the tasks per node {text!r} that Slurm gives cannot be read; {_INSTEAD}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def rendezvous_port(job: int, step: int) -> int:
    """Where the ranks of a job step meet on its first host: the same for all of them, another one for another step there."""
    return FIRST_PORT + (job + 997 * step) % PORTS


def card(local: int, visible: str | None) -> int:
    """The GPU of the task with number `local` on its host, counted among the `visible` ones (CUDA_VISIBLE_DEVICES).

    Where Slurm gives each task GPUs of its own (--gpus-per-task), a task sees these alone, and takes the first.
    """
    return local % len(visible.split(",")) if visible else local


def _is_task(environ: MutableMapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ and step.isdigit() and int(step) < _RESERVED_STEPS


def _value(environ: MutableMapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise UserError(f"{name} is not set, though this is a task of Slurm; {_INSTEAD}")
    return environ[name]


def _number(environ: MutableMapping[str, str], name: str) -> int:
    value = _value(environ, name)
    if not value.isdigit():
        raise UserError(f"{name}={value} is no number; {_INSTEAD}")
    return int(value)
