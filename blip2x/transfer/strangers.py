"""Asking servers that nobody vouches for: lists of links name any address, and whoever owns it now may answer as he likes.

None gets to know passwords of the netrc file or keeps cookies here, none is in this machine's own network, and none takes
longer than it may, be it a byte at a time.
"""

from __future__ import annotations

import io
import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from http.cookiejar import DefaultCookiePolicy
from threading import local
from typing import Any
from urllib.parse import urljoin

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

MAX_REDIRECTS = 5
# Reserved for benchmarks, so nobody's network; some VPNs answer for every name with one of these and connect to the true one
_BENCHMARKS = ipaddress.ip_network("198.18.0.0/15")
_now = local()  # .end: when this thread's answer has to be there


class NotPublicError(Exception):
    """The address leads into a network of this machine."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, and neither this machine's nor of a network behind a router."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global or ip in _BENCHMARKS


def session() -> requests.Session:
    """One for `ask`, of one thread."""
    made = requests.Session()
    made.auth = lambda request: request  # or requests would look into the netrc file
    made.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    for scheme in ("http://", "https://"):
        made.mount(scheme, _Adapter())
    return made


@contextmanager
def ask(asking: requests.Session, url: str, end: float, headers: dict[str, str]) -> Iterator[requests.Response]:
    """The answer that `url` leads to, whose content is still to be read; it has to come before `end`, by `time.monotonic`.

    Raises:
        NotPublicError: see there. Behind a proxy, that one decides.
        requests.RequestException: no answer, or none in time; more than `MAX_REDIRECTS` redirects. While reading, urllib3's.
    """
    _now.end = end
    for _ in range(MAX_REDIRECTS + 1):
        left = max(end - time.monotonic(), 0.001)
        with asking.get(url, timeout=left, stream=True, headers=headers, allow_redirects=False) as answer:
            target = asking.get_redirect_target(answer)
            if target is None:
                yield answer
                return
        url = urljoin(url, target)  # the redirect's own content is not read
    raise requests.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")


class _Timed(io.RawIOBase):
    """A socket's bytes: each piece has to come before the end of all, while a socket's timeout begins anew with each."""

    def __init__(self, socket: Any, raw: io.RawIOBase):
        self._socket, self._raw, self._end = socket, raw, _now.end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("too slow")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **options: Any):
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Timed(sock, self.fp.detach()))


class _Guarded:
    """What both kinds of connections do differently."""

    response_class = _Response

    def _new_conn(self) -> Any:
        line = super()._new_conn()
        address = line.getpeername()[0]
        if self.proxy is None and not is_public(address):
            line.close()
            raise NotPublicError(address)
        return line


class _Connection(_Guarded, HTTPConnection):
    pass


class _SafeConnection(_Guarded, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SafePool(HTTPSConnectionPool):
    ConnectionCls = _SafeConnection


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _SafePool}

    def proxy_manager_for(self, *arguments: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **options)
        if manager.proxy.scheme in ("http", "https"):  # the pools for SOCKS make connections of their own
            manager.pool_classes_by_scheme = {"http": _Pool, "https": _SafePool}
        return manager
