import base64
import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from blip2x.errors import UserError
from blip2x.transfer import download as transfer
from blip2x.transfer.download import NotServedError, download, read_origin
from blip2x.transfer.files import locked
from tests.web_server import PIECE, WebFile, serve

CONTENT = random.Random(0).randbytes(5 * PIECE + 100)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHER = bytes(reversed(CONTENT))


@pytest.fixture
def web(monkeypatch):
    with serve(monkeypatch) as server:
        yield server


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights" / "file.bin"


@pytest.fixture
def said():
    return []


def fetch(web, path, **options):
    return download(f"{web.url}/file.bin", path, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(web, path):
    """A process of its own that fetches the file."""
    code = (
        "import sys; from pathlib import Path; from blip2x.transfer.download import download; "
        "download(sys.argv[1], Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, f"{web.url}/file.bin", str(path)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_until(true):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_whole_file_with_its_origin(web, path, said):
    web.files["/file.bin"] = WebFile(CONTENT)
    assert fetch(web, path, say=said.append) == path
    assert path.read_bytes() == CONTENT
    assert read_origin(path) == {"url": f"{web.url}/file.bin", "size": len(CONTENT), "sha256": SHA256}
    assert names(path.parent) == [".file.bin.origin.json", "file.bin"]
    assert said == [f"file.bin: fetching (327.8 kB) from {web.url}/file.bin", "file.bin: 327.8 kB, complete"]


def test_what_is_there_is_not_fetched(web, path):
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert fetch(web, path, size=len(CONTENT), sha256=SHA256.upper()) == path
    with pytest.raises(UserError, match="has 327,780 bytes, but 5 were expected; remove it"):
        fetch(web, path, size=5)
    with pytest.raises(UserError, match=f"has the sha256 {SHA256}, but 00 was expected"):
        fetch(web, path, sha256="00")
    assert web.asked == []


@pytest.mark.parametrize("content", [b"", b"x"])
def test_tiny_files(web, path, content):
    web.files["/file.bin"] = WebFile(content)
    assert fetch(web, path).read_bytes() == content


def test_a_broken_connection_is_continued(web, path, said):
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[2 * PIECE, PIECE])
    assert fetch(web, path, say=said.append).read_bytes() == CONTENT
    assert web.asked == [
        ("/file.bin", None, None),
        ("/file.bin", f"bytes={2 * PIECE}-", '"one"'),
        ("/file.bin", f"bytes={3 * PIECE}-", '"one"'),
    ]
    assert "file.bin: the connection broke off at 131,072 of 327,780 bytes; trying again in 0 s" in said


def test_a_line_that_breaks_off_for_ever_ends_in_a_sentence_and_the_next_call_continues(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[2 * PIECE, 0, 0, 0, 0, 0])
    with pytest.raises(
        UserError, match="broke off at 131,072 of 327,780 bytes; 6 attempts did not help; what has come is kept"
    ):
        fetch(web, path)
    assert not path.exists() and len(web.asked) == 6
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.ranges()[6:] == [f"bytes={2 * PIECE}-"]


def test_a_line_that_breaks_off_often_but_brings_much_is_not_given_up(web, path, monkeypatch):
    monkeypatch.setattr(transfer, "ENOUGH", PIECE // 2)
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[0, 0, 0, 0, PIECE, 0, 0, 0, 0, PIECE, 0, 0, 0, 0])
    assert fetch(web, path).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, busy=[503, 429])
    assert fetch(web, path).read_bytes() == CONTENT
    web.files["/other"] = WebFile(status=500)
    with pytest.raises(UserError, match=r"/other cannot be fetched: the server answers 500 .*; check the address"):
        download(f"{web.url}/other", path.with_name("other"))


def test_a_server_that_announces_too_much(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, length=400_000)
    with pytest.raises(UserError, match="of 400,000 bytes"):
        fetch(web, path)
    assert not path.exists()


def test_a_server_that_announces_too_little(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, length=1000)
    with pytest.raises(UserError, match="it has 1,000 bytes, but 327,780 were expected"):
        fetch(web, path, size=len(CONTENT))
    web.files["/file.bin"].redirect = {"X-Linked-Size": str(len(CONTENT))}
    with pytest.raises(UserError, match="announces 1,000 bytes of a file that should have 327,780"):
        fetch(web, path)
    assert not path.parent.exists() or names(path.parent) == []


def test_a_part_that_ends_before_the_file_does_is_continued(web, path):
    web.files["/file.bin"] = WebFile(CONTENT[: 4 * PIECE], cuts=[PIECE], part_length=PIECE)
    assert fetch(web, path).read_bytes() == CONTENT[: 4 * PIECE]
    assert web.ranges() == [None, *(f"bytes={number * PIECE}-" for number in (1, 2, 3))]


def test_more_than_was_announced_for_the_whole_is_refused(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, chunked=True)
    with pytest.raises(UserError, match="more than the 1,000 bytes that it should have came"):
        fetch(web, path, size=1000)
    assert names(path.parent) == []


def test_an_end_that_cannot_be_told_is_refused(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, chunked=True, cuts=[PIECE, PIECE])
    with pytest.raises(UserError, match="does not say how long the file is"):
        fetch(web, path)
    with pytest.raises(UserError, match=f"its sha256 is .*, but it should be {SHA256}"):
        fetch(web, path, sha256=SHA256)
    assert fetch(web, path, sha256=SHA256).read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(web, path, said):
    web.files["/file.bin"] = WebFile(CONTENT, ranges=False, cuts=[2 * PIECE])
    assert fetch(web, path, say=said.append).read_bytes() == CONTENT
    assert web.ranges() == [None, f"bytes={2 * PIECE}-"]
    assert "file.bin: the server does not continue it, so it starts anew" in said


@pytest.mark.parametrize("etag", [None, 'W/"one"'])
def test_nothing_is_continued_that_could_have_changed_unnoticed(web, path, etag):
    web.files["/file.bin"] = WebFile(CONTENT, etag=etag, cuts=[2 * PIECE, None])
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.ranges() == [None, None]


def test_with_a_known_checksum_no_etag_is_needed(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, etag=None, cuts=[2 * PIECE])
    assert fetch(web, path, sha256=SHA256).read_bytes() == CONTENT
    assert web.asked[1] == ("/file.bin", f"bytes={2 * PIECE}-", None)


def test_a_file_that_changed_between_two_calls_starts_anew(web, path):
    web.files["/file.bin"] = WebFile(OTHER, etag='"old"', cuts=[2 * PIECE, 0, 0, 0, 0, 0])
    with pytest.raises(UserError):
        fetch(web, path)
    web.files["/file.bin"] = WebFile(CONTENT, etag='"new"')
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.asked[6:] == [("/file.bin", f"bytes={2 * PIECE}-", '"old"')]


@pytest.mark.parametrize("changed", [{"etag": '"new"', "heeds": False}, {"content": CONTENT + b"more"}, {"shift": 1}])
def test_a_part_of_another_file_starts_anew(web, path, changed):
    web.files["/file.bin"] = WebFile(OTHER, cuts=[2 * PIECE, 0, 0, 0, 0, 0])
    with pytest.raises(UserError):
        fetch(web, path)
    web.files["/file.bin"] = file = WebFile(**{"content": CONTENT, **changed})
    assert fetch(web, path).read_bytes() == file.content
    assert web.ranges()[6:] == [f"bytes={2 * PIECE}-", None]


def test_with_a_published_checksum_the_etag_may_change(web, path):
    """Where Hugging Face redirects to, each server has its own."""
    web.files["/file.bin"] = WebFile(CONTENT, redirect=linked(CONTENT), cuts=[2 * PIECE, 0, 0, 0, 0, 0])
    with pytest.raises(UserError):
        fetch(web, path)
    web.files["/file.bin"] = WebFile(CONTENT, redirect=linked(CONTENT), etag='"other"')
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.asked[6:] == [("/file.bin", f"bytes={2 * PIECE}-", None)]


def test_a_published_checksum_that_changed_starts_anew_even_with_a_fitting_part(web, path):
    web.files["/file.bin"] = WebFile(OTHER, etag=None, redirect=linked(OTHER), cuts=[2 * PIECE, 0, 0, 0, 0, 0])
    with pytest.raises(UserError):
        fetch(web, path)
    web.files["/file.bin"] = WebFile(CONTENT, etag=None, redirect=linked(CONTENT))
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.ranges()[6:] == [f"bytes={2 * PIECE}-", None]


def test_too_much_of_an_earlier_file_starts_anew(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[2 * PIECE, 0, 0, 0, 0, 0])
    with pytest.raises(UserError):
        fetch(web, path)
    web.files["/file.bin"] = WebFile(CONTENT[:PIECE])  # same ETag, but shorter: 416
    assert fetch(web, path).read_bytes() == CONTENT[:PIECE]
    assert web.ranges()[6:] == [f"bytes={2 * PIECE}-", None]


def test_a_partial_file_of_unknown_origin_is_not_used(web, path):
    path.parent.mkdir()
    path.with_name(".file.bin.partial").write_bytes(OTHER[:PIECE])
    path.with_name(".file.bin.partial.json").write_text('{"a": 1}')
    web.files["/file.bin"] = WebFile(CONTENT)
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.ranges() == [None]


def linked(content):
    """How Hugging Face announces a large file, on a redirect."""
    return {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}


def test_the_sha256_of_a_redirect_is_checked(web, path):
    web.files["/file.bin"] = WebFile(OTHER, redirect=linked(CONTENT))
    with pytest.raises(UserError) as error:
        fetch(web, path)
    assert SHA256 in str(error.value) and hashlib.sha256(OTHER).hexdigest() in str(error.value)
    assert names(path.parent) == []
    web.files["/file.bin"] = WebFile(CONTENT, redirect=linked(CONTENT), cuts=[PIECE])
    assert fetch(web, path).read_bytes() == CONTENT


def test_the_sha256_of_the_caller_is_checked(web, path):
    web.files["/file.bin"] = WebFile(OTHER)
    with pytest.raises(UserError, match=f"but it should be {SHA256}"):
        fetch(web, path, sha256=SHA256)
    web.files["/file.bin"].redirect = linked(OTHER)
    web.asked.clear()
    with pytest.raises(UserError, match=f"but {SHA256} was expected"):
        fetch(web, path, sha256=SHA256)
    assert names(path.parent) == []


@pytest.mark.parametrize("header", ["x-goog-hash", "Content-MD5"])
def test_a_published_md5_is_checked(web, path, header):
    right, wrong = (base64.b64encode(hashlib.md5(content).digest()).decode() for content in (CONTENT, OTHER))
    prefix = "crc32c=AAAAAA==,md5=" if header == "x-goog-hash" else ""
    web.files["/file.bin"] = WebFile(CONTENT, headers={header: prefix + wrong}, cuts=[PIECE])
    with pytest.raises(
        UserError, match=f"its md5 is {hashlib.md5(CONTENT).hexdigest()}, .* be {hashlib.md5(OTHER).hexdigest()}"
    ):
        fetch(web, path)
    assert names(path.parent) == []
    web.files["/file.bin"].headers[header] = prefix + right
    assert fetch(web, path).read_bytes() == CONTENT


def test_compressed_content(web, path):
    md5 = base64.b64encode(hashlib.md5(OTHER).digest()).decode()  # of what is stored, which the server unpacks
    web.files["/file.bin"] = WebFile(CONTENT, headers={"x-goog-hash": f"md5={md5}", "x-goog-stored-content-encoding": "gzip"})
    assert fetch(web, path).read_bytes() == CONTENT
    web.files["/other"] = WebFile(CONTENT, headers={"Content-Encoding": "gzip"})
    with pytest.raises(UserError, match="/other comes compressed, though that was not asked for"):
        download(f"{web.url}/other", path.with_name("other"))


def test_http_errors_have_their_own_sentences(web, path):
    for status, sentence in {404: "does not exist", 401: "is refused", 403: "only for those who have agreed"}.items():
        web.files["/file.bin"] = WebFile(status=status)
        with pytest.raises(NotServedError, match=sentence):
            fetch(web, path)
    web.files["/file.bin"] = WebFile(status=418)
    with pytest.raises(UserError, match="cannot be fetched: the server answers 418"):
        fetch(web, path)
    assert len(web.asked) == 4  # none of them twice


def test_no_server_and_no_web_address(web, path):
    with pytest.raises(UserError, match=r"no connection \(ConnectionError\); 2 attempts did not help; check the address"):
        download("http://127.0.0.1:9/x", path)
    with pytest.raises(UserError, match="file:///etc/passwd is no web address"):
        download("file:///etc/passwd", path)
    with pytest.raises(UserError, match="http:// cannot be fetched"):
        download("http://", path)


def test_a_full_disk_is_found_before_it_is_full(web, path, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100_000))
    web.files["/file.bin"] = WebFile(CONTENT)
    with pytest.raises(UserError, match=r"file.bin: 327.8 kB are still to come, but its disk has 100.0 kB free"):
        fetch(web, path)
    assert not path.exists()


def test_a_place_that_cannot_be_written(web, tmp_path):
    (tmp_path / "file").touch()
    web.files["/file.bin"] = WebFile(CONTENT)
    with pytest.raises(UserError, match="cannot be written"):
        fetch(web, tmp_path / "file" / "file.bin")


def test_a_killed_process_leaves_no_file_and_the_next_continues(web, path):
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[2 * PIECE], gate=threading.Event())
    partial = path.with_name(".file.bin.partial")
    with start(web, path) as process:
        wait_until(lambda: partial.exists() and partial.stat().st_size == 2 * PIECE)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not path.exists()
    assert fetch(web, path).read_bytes() == CONTENT
    assert web.ranges() == [None, f"bytes={2 * PIECE}-"]
    assert names(path.parent) == [".file.bin.origin.json", "file.bin"]


def test_a_process_killed_before_the_last_step_has_nothing_to_fetch_again(web, path, monkeypatch):
    web.files["/file.bin"] = WebFile(CONTENT)
    monkeypatch.setattr(transfer, "move", lambda source, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch(web, path)
    assert not path.exists()
    monkeypatch.undo()
    assert fetch(web, path).read_bytes() == CONTENT
    assert len(web.asked) == 1


def test_two_processes_fetch_once(web, path):
    gate = threading.Event()
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[PIECE], gate=gate)
    with start(web, path) as first:
        wait_until(lambda: web.asked)
        with start(web, path) as second:
            assert second.stderr.readline() == "file.bin: another process is fetching it; waiting\n"
            gate.set()
            assert (first.wait(20), second.wait(20)) == (0, 0)
    assert path.read_bytes() == CONTENT
    assert len(web.asked) == 1
    assert names(path.parent) == [".file.bin.origin.json", "file.bin"]


def test_a_lock_that_was_removed_while_waiting_is_not_taken_for_one(tmp_path):
    path, lock = tmp_path / "x", tmp_path / ".x.lock"
    waits, entered = threading.Event(), threading.Event()

    def enter():
        with locked(path, lambda line: waits.set()):
            entered.set()

    with lock.open("a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        thread = threading.Thread(target=enter)
        thread.start()
        assert waits.wait(20)
        lock.unlink()  # the first is done, and a third comes before the second looks
        third = lock.open("a")
        fcntl.flock(third, fcntl.LOCK_EX)
    assert not entered.wait(0.2)
    third.close()
    assert entered.wait(20)
    thread.join()
    assert not lock.exists()


def test_many_threads_fetch_once(web, path):
    web.files["/file.bin"] = WebFile(CONTENT)
    threads = [threading.Thread(target=fetch, args=(web, path), kwargs={"say": lambda line: None}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT and len(web.asked) == 1


def test_lines_tell_the_rate_now_and_then(web, path, said, monkeypatch):
    monkeypatch.setattr("blip2x.transfer.progress.SECONDS_BETWEEN_LINES", 0.0)
    web.files["/file.bin"] = WebFile(CONTENT)
    fetch(web, path, say=said.append)
    assert any(line.startswith("file.bin: 131.1 kB of 327.8 kB, ") and line.endswith("/s") for line in said)


def test_a_terminal_gets_a_bar(web, path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    web.files["/file.bin"] = WebFile(CONTENT, cuts=[PIECE])
    fetch(web, path)
    shown = capsys.readouterr().err
    assert "327.8/327.8 kB" in shown and "broke off at 65,536 of 327,780 bytes" in shown


def test_importing_is_light():
    code = "import blip2x.models.weights.known, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"requests", "rich", "numpy", "paddle", "paddlenlp", "transformers", "huggingface_hub"}.isdisjoint(loaded)
