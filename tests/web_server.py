"""A web server in a thread, whose files can break off, lie and change, and which remembers what it was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

KB = 1024
PIECE = 64 * KB  # what `download` reads at once, so that parts of whole pieces arrive whole


@dataclass
class WebFile:
    """What the server has at one path."""

    content: bytes = b""
    etag: str | None = '"one"'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    redirect: dict[str, str] | None = None  # headers of a redirect that leads to the content
    ranges: bool = True  # whether parts can be had
    heeds: bool = True  # whether a part is given only where If-Range fits
    shift: int = 0  # the first byte of a part is announced as so many bytes later
    length: int | None = None  # what is announced, if not the truth
    part_length: int | None = None  # the same of an answer with a part
    chunked: bool = False  # no length is announced
    cuts: list[int | None] = field(default_factory=list)  # the next answers break off after so many bytes; None: they do not
    busy: list[int] = field(default_factory=list)  # the next answers are these errors
    gate: threading.Event | None = None  # has to be set before what comes after a cut


@dataclass
class WebServer:
    """Files by path, and (path, Range, If-Range) of each request."""

    url: str = ""
    files: dict[str, WebFile] = field(default_factory=dict)
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)

    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.asked]

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.asked]


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """The server; attempts to fetch something from it follow each other without a wait."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr("blip2x.transfer.download.WAITS", (0,) * 5)
    monkeypatch.setattr("blip2x.transfer.strangers.is_public", lambda address: True)  # this server is on this machine
    web = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.removeprefix("/storage")
            file = web.files.get(path, WebFile(status=404))
            if file.redirect is not None and path == self.path:
                self.send_response(302)
                for name, value in {**file.redirect, "Location": f"/storage{path}", "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            web.asked.append((path, self.headers.get("Range"), self.headers.get("If-Range")))
            self.answer(file)

        def answer(self, file: WebFile):
            status = file.busy.pop(0) if file.busy else file.status
            if status != 200:
                self.send_error(status)
                return
            first = self.first(file)
            if first and first >= len(file.content):
                self.send_error(416)
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first + file.shift}-{len(file.content) - 1}/{len(file.content)}")
            announced = file.part_length if first else file.length
            if not file.chunked:
                self.send_header("Content-Length", str(len(file.content) - first if announced is None else announced))
            for name, value in {**({"ETag": file.etag} if file.etag else {}), **file.headers}.items():
                self.send_header(name, value)
            if "gzip" in self.headers.get("Accept-Encoding", ""):  # lengths would be of other content
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            cut = file.cuts.pop(0) if file.cuts else None
            body = file.content[first:]
            self.wfile.write(body[:cut])
            if cut is not None and file.gate:
                file.gate.wait(30)
                with suppress(OSError):  # whoever asked may be dead
                    self.wfile.write(body[cut:])

        def first(self, file: WebFile) -> int:
            """The first byte that is wanted and will be sent."""
            fits = not file.heeds or self.headers.get("If-Range") in (None, file.etag)
            return int(self.headers["Range"][6:-1]) if "Range" in self.headers and file.ranges and fits else 0

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    web.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield web
    finally:
        for file in web.files.values():
            if file.gate:
                file.gate.set()
        server.shutdown()
        server.server_close()
