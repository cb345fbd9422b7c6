"""Waiting for ranks that are late, without end.

gloo gives up on a rank after 30 seconds, and paddle offers no other number. But ranks may be late for longer: shares of an
evaluation take unequally long, and rank 0 alone writes and scores. So on CPUs they meet here before they exchange something.
"""

from __future__ import annotations

import os
import secrets
from multiprocessing.connection import Client, Connection, Listener

from blip2x.errors import UserError
from blip2x.parallel.lost_ranks import lost_rank_message


class Meeting:
    """A place where all ranks wait for each other; a rank that dies breaks its connection, and so ends the wait.

    Args:
        connections: of rank 0 to each other rank; of the others to rank 0.
        is_host: whether this is rank 0.
    """

    def __init__(self, connections: list[Connection], *, is_host: bool):
        self._connections = connections
        self._is_host = is_host

    def wait(self) -> None:
        """Return when every rank has come.

        Raises:
            UserError: a rank is gone.
        """
        # rank 0 hears all of the others, then tells them
        steps = (self._hear, self._tell) if self._is_host else (self._tell, self._hear)
        try:
            for step in steps:
                step()
        except (EOFError, OSError) as error:
            for connection in self._connections:
                connection.close()  # so that the others hear of it, too
            raise UserError(lost_rank_message()) from error

    def _hear(self) -> None:
        for connection in self._connections:
            connection.recv_bytes()

    def _tell(self) -> None:
        for connection in self._connections:
            connection.send_bytes(b"here")


class Host:
    """Rank 0 before the others have come: `address` and `key` are what they need to `join`."""

    def __init__(self, host: str):
        self.key = secrets.token_bytes(32)
        self._listener = Listener(("", 0), backlog=64, authkey=self.key)
        self.address = (host, self._listener.address[1])

    def receive(self, others: int) -> Meeting:
        """Wait until so many have joined."""
        with self._listener:
            return Meeting([self._listener.accept() for _ in range(others)], is_host=True)


def join(address: tuple[str, int], key: bytes) -> Meeting:
    """Go where rank 0 is."""
    return Meeting([Client(address, authkey=key)], is_host=False)


def host_name() -> str:
    """Under which the others know rank 0's machine: the launcher, or Slurm's variables, say it."""
    return os.environ.get("PADDLE_TRAINER_ENDPOINTS", "127.0.0.1").split(",")[0].rpartition(":")[0] or "127.0.0.1"
