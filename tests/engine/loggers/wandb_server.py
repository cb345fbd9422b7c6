"""A stand-in for W&B's server: it breaks, hangs, or takes runs until it is told to hang."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def answer(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The data of an answer to an operation of W&B's GraphQL."""
    name = variables.get("name")
    bucket = {"id": name, "name": name, "displayName": name, "project": {"name": "p", "entity": {"name": "e"}}}
    return {
        "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
        "CreateRunFiles": {"createRunFiles": {"runID": variables.get("run"), "uploadHeaders": [], "files": []}},
    }.get(operation, {"model": None})


@dataclass
class Server:
    """What it does with requests, and the operations that it was asked for, with what came along."""

    url: str
    status: int
    hangs: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def bodies(self, operation: str) -> list[str]:
        return [body for asked, body in self.asked if asked == operation]


@contextmanager
def serve(*, status: int = 200, hangs: bool = False) -> Iterator[Server]:
    """The server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked = json.loads(body) if self.path == "/graphql" else {}
            operation = asked.get("operationName") or self.path.split("/")[-1]
            web.asked.append((operation, body))
            if web.hangs.is_set():
                web.over.wait(60)
            content = json.dumps({"data": answer(operation, asked.get("variables", {}))}).encode()
            self.send_response(web.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None  # whoever asked has given up
    web = Server(f"http://127.0.0.1:{server.server_port}", status)
    if hangs:
        web.hangs.set()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield web
    finally:
        web.over.set()
        server.shutdown()
        server.server_close()
