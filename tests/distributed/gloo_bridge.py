"""What paddle 3.3.1 refuses or gets wrong on CPUs and the tests do all the same; `build` before the process group is made.

The product does without: it refuses what is bridged here.
"""

import socket

from paddle.base import core
from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_stage3

from blip2x.parallel.strategies import hybrid

stores = []  # a group's store has to live as long as the group
ATTEMPTS = range(50)


def build():
    """Several groups on gloo, and stage 3, on CPUs."""
    hybrid.check_sharding = lambda stage, degrees, device: None
    create = core.ProcessGroupGloo.create
    core.ProcessGroupGloo.create = staticmethod(
        lambda store, rank, size, group=0: create(own_store(store, rank, group), rank, size, group)
    )
    group_sharded_stage3.core = Changed(core, is_compiled_with_cuda=lambda: True)  # else its constructor stops


def own_store(store, rank, group):
    """A store for this group alone: gloo's ranks publish their addresses under 0, 1, ... without the group's number.

    Groups that share a store read each other's addresses.
    """
    key = f"gloo_bridge/{group}"
    if rank == 0:
        # for one process, or making it would wait for the others, who do not know the port yet
        port, made = next(found for _ in ATTEMPTS if (found := try_store()))
        store.set(key, str(port))
    else:
        made = core.TCPStore("127.0.0.1", int(bytes(store.get(key))), False, 1)
    stores.append(made)
    return made


def try_store():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    try:
        return port, core.TCPStore("127.0.0.1", port, True, 1)
    except RuntimeError:  # somebody else took the port meanwhile
        return None


class Changed:
    """A module with some attributes in place of its own."""

    def __init__(self, module, **own):
        self.__dict__.update(own, module=module)

    def __getattr__(self, name):
        return getattr(self.module, name)
