"""An application on an address of this machine."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import uvicorn

from blip2x.errors import UserError

_GRACE = 3  # seconds that answers on their way get when the server ends


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address; port 0: any free one. Nothing can connect before it is served on.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise UserError(
            f"task.host={host} task.port={port} cannot be served on: {error.strerror or error}; choose another one, or "
            "task.port=0 for any that is free"
        ) from None
    return sock


def require_free(host: str, port: int) -> None:
    """Raise as `bind` does, and leave the address free."""
    with closing(bind(host, port)):
        pass


def is_this_machine(host: str) -> bool:
    """Whether `host` is a name by which a machine calls itself, which nobody else can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def address_of(sock: socket.socket) -> str:
    """Where a browser finds what is served on `sock`."""
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:  # all addresses; a browser on this machine takes this one
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def serving(app: Any, sock: socket.socket) -> Iterator[threading.Thread]:
    """Inside the block `app` is served on `sock` by another thread, which is given; it ends with the block."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        log_config=None,  # tracebacks of our own bugs go to stderr, everything else nowhere
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    server = uvicorn.Server(config)
    sock.listen(config.backlog)  # from here on who connects is answered, if a moment later
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server", daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join(2 * _GRACE)
        sock.close()
