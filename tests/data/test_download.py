import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from blip2x.data.download import WebImage, fetch
from blip2x.errors import UserError


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", "10" if self.path == "/cut" else "5")
        self.end_headers()
        try:
            for letter in b"hello":
                time.sleep(0.2 if self.path == "/slow" else 0)
                self.wfile.write(bytes([letter]))
        except BrokenPipeError:
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_content_arrives(server):
    assert fetch(f"{server}/file") == b"hello"


def test_http_errors_are_named(server):
    with pytest.raises(UserError, match=r"/missing cannot be fetched: the server answers 404"):
        fetch(f"{server}/missing")


def test_large_files_are_given_up(server):
    with pytest.raises(UserError, match="is larger than 3 bytes"):
        fetch(f"{server}/file", max_bytes=3)


def test_slow_and_broken_answers_are_given_up(server):
    with pytest.raises(UserError, match=r"no complete answer within 0.3 seconds"):
        fetch(f"{server}/slow", timeout=0.3)
    with pytest.raises(UserError, match="/cut cannot be fetched"):
        fetch(f"{server}/cut")


def test_no_server_and_no_web_address():
    with pytest.raises(UserError, match="cannot be fetched: no connection"):
        fetch("http://127.0.0.1:9/x", timeout=2)
    with pytest.raises(UserError, match="file:///etc/passwd is no web address"):
        fetch("file:///etc/passwd")
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("http://")


def test_a_picture_at_an_address_is_fetched_when_it_is_opened(server):
    image = WebImage(f"{server}/file", 10**6)
    assert image.name == f"{server}/file"
    with pytest.raises(UserError, match=f"^{server}/file is not an image that Pillow can read"):
        image.open()
    with pytest.raises(UserError, match="/missing cannot be fetched"):
        WebImage(f"{server}/missing", 10**6).open()
