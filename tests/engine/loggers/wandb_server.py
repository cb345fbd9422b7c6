"""A stand-in for W&B's server: it breaks, hangs, or takes runs until it is told to hang."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = {"id": "x", "name": "x", "displayName": "x", "project": {"name": "p", "entity": {"name": "e"}}}
ANSWERS = {
    "UpsertBucket": {"upsertBucket": {"bucket": BUCKET, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}},
}


@dataclass
class Server:
    """What it does with requests, and the operations that it was asked for."""

    url: str
    status: int
    hangs: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)


@contextmanager
def serve(*, status: int = 200, hangs: bool = False) -> Iterator[Server]:
    """The server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            operation = json.loads(body).get("operationName") if self.path == "/graphql" else self.path
            web.asked.append(operation)
            if web.hangs.is_set():
                web.over.wait(60)
            answer = json.dumps({"data": ANSWERS.get(operation, {"model": None})}).encode()
            self.send_response(web.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

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
