from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
from PIL import Image

from blip2x.data.pictures import decode_picture, to_rgb
from blip2x.data.tokenize import clean_caption
from blip2x.errors import UserError
from blip2x.transfer.link_record import RECORD
from blip2x.transfer.linked_images import fetch_linked, missing_images
from blip2x.transfer.linked_picture import Limits
from blip2x.transfer.links import Link
from blip2x.transfer.strangers import is_public
from tests.data.layouts import picture
from tests.web_server import WebFile, serve

LIMITS = Limits(connections=3, timeout=5, attempts=2, max_bytes=100_000, max_pixels=10_000, max_side=None, retry_failed=False)


@pytest.fixture
def web(monkeypatch):
    with serve(monkeypatch) as server:
        monkeypatch.setattr("blip2x.transfer.linked_picture.WAITS", (0,))
        yield server


@pytest.fixture
def fetch(web, tmp_path):
    """`fetch(names)`: those pictures of the server, and the outcome."""

    def call(names, limits=LIMITS, captions="captions.jsonl", **options):
        rows = [{"url": f"{web.url}/{name}", "caption": f"of {name}"} for name in names]
        (tmp_path / "list.json").write_text(json.dumps(rows))
        limits = replace(limits, **options)
        path = captions and tmp_path / captions
        return fetch_linked([tmp_path / "list.json"], tmp_path / "images", path, limits, to_rgb, lambda line: None)

    return call


def written(tmp_path):
    return [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]


def test_pictures_without_a_usable_caption_are_not_among_the_captions(web, fetch, tmp_path):
    for name in "ab":
        web.files[f"/{name}"] = WebFile(picture("red"))
    fetch("ab")
    rows = [{"url": f"{web.url}/a", "caption": "***"}, {"url": f"{web.url}/a"}, {"url": f"{web.url}/b", "caption": "of b"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    paths = [tmp_path / "list.json"], tmp_path / "images", tmp_path / "captions.jsonl"
    outcome = fetch_linked(*paths, LIMITS, to_rgb, lambda line: None, clean_caption)
    assert (outcome.there, outcome.uncaptioned) == (3, 2)
    assert [row["caption"] for row in written(tmp_path)] == ["of b"]


def record(tmp_path):
    lines = (tmp_path / "images" / RECORD).read_text().splitlines()
    return {key: (state, why) for key, state, why in (line.split("\t") for line in lines)}


def test_pictures_come_with_their_captions_in_the_order_of_the_list(web, fetch, tmp_path):
    for at, (kind, ending) in enumerate([("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif")]):
        web.files[f"/{at}"] = WebFile(picture("red", format=kind))
        key = Link(f"{web.url}/{at}", None, None).key
        web.files[f"/{at}"].name = f"{key[:3]}/{key[3:]}.{ending}"
    outcome = fetch("3102")
    assert (outcome.there, outcome.fetched, outcome.failed) == (4, 4, 0)
    assert written(tmp_path) == [{"image": web.files[f"/{at}"].name, "caption": f"of {at}"} for at in "3102"]
    for row in written(tmp_path):
        assert Image.open(tmp_path / "images" / row["image"]).size == (32, 24)
    web.asked.clear()
    again = fetch("3102")
    assert (again.there, again.fetched, web.asked) == (4, 0, [])


def test_why_pictures_cannot_be_had(web, fetch, tmp_path):
    web.files |= {
        "/gone": WebFile(status=404),
        "/page": WebFile(b"<html>"),
        "/empty": WebFile(b""),
        "/large": WebFile(b"x" * 200_000),
        "/many": WebFile(picture("red", (200, 100))),
        "/bomb": WebFile(_claims(picture("red", format="PNG"), 60_000)),
        "/svg": WebFile(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "/good": WebFile(picture("red")),
    }
    names = ["gone", "page", "empty", "large", "many", "bomb", "svg", "good"]
    outcome = fetch(names)
    assert (outcome.there, outcome.failed) == (1, 7)
    assert outcome.reasons == {
        "HTTP 404": 1,
        "no picture that can be read": 3,
        "more than 100,000 bytes": 1,
        "too many pixels": 2,
    }
    keys = {name: Link(f"{web.url}/{name}", None, None).key for name in names}
    assert record(tmp_path)[keys["gone"]] == ("-", "HTTP 404") and record(tmp_path)[keys["good"]] == ("jpg", "")
    assert [row["caption"] for row in written(tmp_path)] == ["of good"]
    web.asked.clear()
    assert fetch(names).failed == 7 and web.asked == []
    web.files["/gone"] = WebFile(picture("red"))
    outcome = fetch(names, retry_failed=True)
    assert (outcome.there, outcome.fetched, outcome.failed) == (2, 1, 6) and "/good" not in web.paths()
    assert [row["caption"] for row in written(tmp_path)] == ["of gone", "of good"]
    assert fetch(names).there == 2  # the last line of an address holds


def _claims(png: bytes, side: int) -> bytes:
    """With other width and height in its header."""
    import zlib

    header = png[12:16] + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def test_addresses_that_are_none(web, tmp_path):
    web.files["/x"] = WebFile(picture("red"), redirect={})
    urls = ["file:///etc/passwd", "ftp://a/x.jpg", "", "no address", "http://", "http://a:b/", f"{web.url}/x"]
    (tmp_path / "list.json").write_text(json.dumps([{"url": url, "caption": "x"} for url in urls]))
    outcome = fetch_linked([tmp_path / "list.json"], tmp_path / "images", None, LIMITS, to_rgb, lambda line: None)
    assert (outcome.there, outcome.failed) == (1, 6)
    assert all(reason.startswith("no answer that is one (") for reason in outcome.reasons)


def test_images_that_have_been_removed_since(web, fetch, tmp_path):
    web.files["/x"] = WebFile(picture("red"))
    fetch(["x"])
    (image,) = (tmp_path / "images").glob("*/*.jpg")
    image.unlink()
    assert missing_images([tmp_path / "list.json"], tmp_path / "images") == 1
    assert fetch(["x"]).fetched == 0  # not looked for each time
    assert fetch(["x"], retry_failed=True).fetched == 1 and image.is_file()
    assert missing_images([tmp_path / "list.json"], tmp_path / "images") == 0


def test_what_passes_is_tried_again(web, fetch):
    web.files["/busy"] = WebFile(picture("red"), busy=[503])
    web.files["/cut"] = WebFile(picture("red"), cuts=[10])
    web.files["/always"] = WebFile(status=500)
    outcome = fetch(["busy", "cut", "always"])
    assert (outcome.there, outcome.failed) == (2, 1) and web.paths().count("/always") == 2


def test_slow_servers_are_given_up(web, fetch):
    gate = threading.Event()
    web.files["/slow"] = WebFile(picture("red"), cuts=[10], gate=gate)
    try:
        outcome = fetch(["slow"], timeout=0.1, attempts=1)
    finally:
        gate.set()
    assert outcome.reasons == {"too slow": 1}


DRIPS = {
    "content": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\nX-Long: ",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;",
}


@pytest.mark.parametrize("kind", DRIPS)
def test_a_drip_is_given_up(kind, web, tmp_path):
    """Each byte comes in time, the picture would not."""
    server = socket.create_server(("127.0.0.1", 0))

    def drip():
        line, _ = server.accept()
        line.recv(4096)
        with line, suppress(OSError):
            line.sendall(DRIPS[kind])
            while True:
                line.sendall(b"x")
                time.sleep(0.02)

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    rows = [{"url": f"http://127.0.0.1:{server.getsockname()[1]}/x.jpg", "caption": "x"}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    limits = replace(LIMITS, timeout=0.2, attempts=1)
    outcome = fetch_linked([tmp_path / "list.json"], tmp_path / "images", None, limits, to_rgb, lambda line: None)
    server.close()
    assert outcome.reasons == {"too slow": 1}


def test_redirects_end_and_carry_nothing_on(web, fetch, tmp_path, monkeypatch):
    """Neither cookies nor passwords of ~/.netrc reach a server, and a redirect's own content is not waited for."""
    asked = []
    server = socket.create_server(("127.0.0.1", 0))
    host = f"127.0.0.1:{server.getsockname()[1]}"

    def answer():
        while True:
            try:
                line, _ = server.accept()
            except OSError:
                return
            with line, suppress(OSError):
                asked.append(line.recv(4096).decode())
                number = int(asked[-1].split("/")[1].split()[0])
                to = f"{web.url}/x" if number == 95 else f"http://{host}/{number + 1}"
                line.sendall(
                    f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nSet-Cookie: a=b\r\nContent-Length: 999\r\n\r\nx".encode()
                )

    threading.Thread(target=answer, daemon=True).start()
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web.files["/x"] = WebFile(picture("red"))
    rows = [{"url": f"http://{host}/{start}", "caption": "x"} for start in (91, 1)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    outcome = fetch_linked([tmp_path / "list.json"], tmp_path / "images", None, LIMITS, to_rgb, lambda line: None)
    server.close()
    assert outcome.there == 1 and outcome.reasons == {"no answer that is one (TooManyRedirects)": 1} and len(asked) == 5 + 6
    assert not any("cookie" in text.lower() or "authorization" in text.lower() for text in asked)


def test_addresses_of_the_own_network_are_not_asked(web, fetch, monkeypatch):
    monkeypatch.setattr("blip2x.transfer.strangers.is_public", is_public)
    web.files["/x"] = WebFile(picture("red"))
    with pytest.raises(UserError, match=r"no connection at all, .*/x \(an address of this machine's own network\)"):
        fetch(["x"])
    assert web.asked == []
    addresses = {"8.8.8.8": True, "2001:4860:4860::8888": True, "::ffff:8.8.8.8": True, "198.18.0.5": True}
    addresses |= dict.fromkeys(
        ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "0.0.0.0"), False
    )
    assert {address: is_public(address) for address in addresses} == addresses


def test_a_proxy_decides_itself(web, fetch, monkeypatch):
    monkeypatch.setattr("blip2x.transfer.strangers.is_public", is_public)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", web.url)
    url = web.url.replace("127.0.0.1", "10.1.2.3")
    web.files[f"{url}/x"] = WebFile(picture("red"))
    monkeypatch.setattr(web, "url", url)
    assert fetch(["x"]).there == 1


def test_cut_pictures_and_those_of_phones(web, fetch, tmp_path):
    noise = Image.effect_noise((64, 64), 50)
    file = io.BytesIO()
    noise.save(file, "JPEG")
    web.files["/cut"] = WebFile(file.getvalue()[: file.tell() // 2])
    file = io.BytesIO()
    noise.save(file, "MPO", save_all=True, append_images=[noise])
    assert Image.open(file).format == "MPO"
    web.files["/phone"] = WebFile(file.getvalue())
    assert fetch(["cut", "phone"]).reasons == {"no picture that can be read": 1}
    (row,) = written(tmp_path)
    assert row["image"].endswith(".jpg") and row["caption"] == "of phone"
    assert decode_picture((tmp_path / "images" / row["image"]).read_bytes(), "x", 10_000).size == (64, 64)


def test_chunked_answers(web, fetch):
    web.files["/x"] = WebFile(picture("red"), chunked=True)
    assert fetch(["x"]).there == 1


def test_large_pictures_are_stored_smaller(web, fetch, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    Image.new("RGB", (80, 40), "red").save(file, "JPEG", exif=exif)
    web.files["/turned"] = WebFile(file.getvalue())
    file = io.BytesIO()
    Image.new("RGBA", (90, 30), (0, 0, 0, 0)).save(file, "PNG")
    web.files["/clear"] = WebFile(file.getvalue())
    web.files["/small"] = WebFile(picture("red", format="PNG"))
    fetch(["turned", "clear", "small"], max_side=32)
    turned, clear, small = (Image.open(tmp_path / "images" / row["image"]) for row in written(tmp_path))
    assert (turned.size, turned.format) == ((16, 32), "JPEG") and turned.getexif().get(0x0112, 1) == 1
    assert clear.size[0] == 32 and clear.getpixel((5, 5)) == (255, 255, 255)
    assert (small.size, small.format) == ((32, 24), "PNG")


def test_names_of_the_list(web, tmp_path):
    web.files["/x"] = WebFile(picture("red"))
    images = [{"coco_url": f"{web.url}/x", "file_name": "0013ea.jpg"}]
    (tmp_path / "n.json").write_text(json.dumps({"images": images}))
    outcome = fetch_linked([tmp_path / "n.json"], tmp_path / "images", None, LIMITS, to_rgb, lambda line: None)
    assert outcome.there == 1 and sorted(os.listdir(tmp_path / "images")) == [RECORD, "0013ea.jpg"]
    (tmp_path / "images" / RECORD).unlink()
    web.asked.clear()
    outcome = fetch_linked([tmp_path / "n.json"], tmp_path / "images", None, LIMITS, to_rgb, lambda line: None)
    assert (outcome.there, outcome.fetched, web.asked) == (1, 0, [])  # named pictures are known without the record
    (tmp_path / "images" / RECORD).unlink()
    (tmp_path / "images/0013ea.jpg").write_bytes(b"")
    assert missing_images([tmp_path / "n.json"], tmp_path / "images", 1) == 1
    outcome = fetch_linked([tmp_path / "n.json"], tmp_path / "images", None, LIMITS, to_rgb, lambda line: None)
    assert (outcome.there, outcome.fetched) == (1, 1)
    (tmp_path / "images/0013ea.jpg").write_bytes(b"")
    assert missing_images([tmp_path / "n.json"], tmp_path / "images", 1) == 1


def test_what_is_there_says_nothing_of_the_network(web, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(picture("red"))
    urls = ["http://127.0.0.1:9/0", "http://127.0.0.1:9/1", "http://127.0.0.1:9/2", "no address"]
    images = [{"coco_url": url, "file_name": f"{at}.jpg"} for at, url in enumerate(urls)]
    (tmp_path / "n.json").write_text(json.dumps({"images": images}))
    limits = replace(LIMITS, connections=1, attempts=1)
    with pytest.raises(UserError, match="the last 2 addresses gave no connection at all"):
        fetch_linked([tmp_path / "n.json"], tmp_path / "images", None, limits, to_rgb, lambda line: None)
    assert list(record(tmp_path).values()) == [("jpg", ""), ("-", "no answer that is one (InvalidURL)")]


def test_a_name_that_is_too_long_and_damaged_lines_of_the_record(web, tmp_path):
    web.files["/x"] = WebFile(picture("red"))
    images = [{"coco_url": f"{web.url}/x?{at}", "file_name": name} for at, name in enumerate(("\u5b57" * 150, "y" * 200))]
    web.files |= {f"/x?{at}": web.files["/x"] for at in range(2)}
    (tmp_path / "n.json").write_text(json.dumps({"images": images}))
    (tmp_path / "images").mkdir()
    damaged = [b"not hexadecimal here....\tjpg\t", b"\xff" * 24 + b"\tjpg\t", b"0" * 24 + b"\t\xff\t"]
    (tmp_path / "images" / RECORD).write_bytes(b"\n".join([*damaged, b""]))
    outcome = fetch_linked([tmp_path / "n.json"], tmp_path / "images", None, LIMITS, to_rgb, lambda line: None)
    assert outcome.there == 1 and outcome.reasons == {"a name that is too long for a file": 1}


def test_without_a_network_nothing_is_recorded_as_failed(web, tmp_path, monkeypatch):
    rows = [{"url": f"http://127.0.0.{1 + at % 9}:9/{at}.jpg", "caption": "x"} for at in range(200)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"the last 50 addresses gave no connection at all, .*; check your network"):
        fetch_linked(
            [tmp_path / "list.json"], tmp_path / "images", None, replace(LIMITS, attempts=1), to_rgb, lambda line: None
        )
    assert (tmp_path / "images" / RECORD).read_bytes() == b""


@pytest.mark.parametrize("count", [3, 90])
def test_without_a_network_a_single_host_is_not_taken_for_dead(count, web, tmp_path, monkeypatch):
    monkeypatch.setattr("blip2x.transfer.linked_images._MANY", 70)
    rows = [{"url": f"http://127.0.0.1:9/{at}.jpg", "caption": "x"} for at in range(count)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    held = min(count, 70)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"the last {held} addresses gave no connection at all, .*; check your network"):
            fetch_linked(
                [tmp_path / "list.json"], tmp_path / "images", None, replace(LIMITS, attempts=1), to_rgb, lambda line: None
            )
        assert (tmp_path / "images" / RECORD).read_bytes() == b""


def test_dead_addresses_that_are_asked_again_say_nothing_of_the_network(web, fetch, tmp_path):
    """Else a run that only has such could never end."""
    web.files["/x"] = WebFile(picture("red"))
    rows = [{"url": f"http://127.0.0.{1 + at % 9}:9/{at}.jpg", "caption": "x"} for at in range(60)]
    lists = [tmp_path / "list.json"]
    for some in (rows[:40], rows):
        lists[0].write_text(json.dumps([{"url": f"{web.url}/x", "caption": "y"}, *some]))
        limits = replace(LIMITS, attempts=1, retry_failed=some is rows)
        outcome = fetch_linked(lists, tmp_path / "images", None, limits, to_rgb, lambda line: None)
        assert (outcome.there, outcome.failed) == (1, len(some))


def test_a_single_dead_server_among_others_is_recorded(web, tmp_path):
    web.files["/x"] = WebFile(picture("red"))
    rows = [{"url": f"http://127.0.0.1:9/{at}.jpg", "caption": "x"} for at in range(60)]
    (tmp_path / "list.json").write_text(json.dumps([*rows, {"url": f"{web.url}/x", "caption": "y"}]))
    limits = replace(LIMITS, attempts=1)
    outcome = fetch_linked([tmp_path / "list.json"], tmp_path / "images", None, limits, to_rgb, lambda line: None)
    assert (outcome.there, outcome.failed) == (1, 60)


def test_a_broken_list_stops_and_keeps_what_has_come(web, tmp_path):
    web.files["/x"] = WebFile(picture("red"))
    (tmp_path / "list.json").write_text(f'[{{"url": "{web.url}/x", "caption": "x"}}, {{"url": 3}}]')
    with pytest.raises(UserError, match="entry 1 has no web address"):
        fetch_linked([tmp_path / "list.json"], tmp_path / "images", tmp_path / "c.jsonl", LIMITS, to_rgb, lambda line: None)
    assert not (tmp_path / "c.jsonl").exists()


def test_a_full_disk_stops_it(web, fetch, monkeypatch):
    web.files["/x"] = WebFile(picture("red"))

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match="images cannot be written: No space left on device"):
        fetch(["x"])


def test_a_killed_run_is_gone_on_with(web, tmp_path):
    for at in range(6):
        web.files[f"/{at}"] = WebFile(picture("red"))
    web.files["/5"].cuts, web.files["/5"].gate = [10], threading.Event()
    rows = [{"url": f"{web.url}/{at}", "caption": f"of {at}"} for at in range(6)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    code = (
        "import sys; from pathlib import Path; from blip2x.transfer.linked_images import *; "
        "from blip2x.transfer import strangers; strangers.is_public = lambda address: True; "
        "limits = Limits(1, 30, 1, 10**6, 10**6, None, False); "
        "fetch_linked([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]), limits, None)"
    )
    paths = [str(tmp_path / name) for name in ("list.json", "images", "captions.jsonl")]
    process = subprocess.Popen([sys.executable, "-c", code, *paths])
    while "/5" not in web.paths():
        assert process.poll() is None
    process.kill()
    process.wait()
    web.files["/5"].gate.set()
    web.files["/5"].gate = None
    with (tmp_path / "images" / RECORD).open("ab") as file:  # as a kill in the midst of a line leaves it
        file.write(b"0123456789abcdef01234567\tjp")
    web.asked.clear()
    outcome = fetch_linked([tmp_path / "list.json"], tmp_path / "images", tmp_path / "captions.jsonl", LIMITS, to_rgb, print)
    assert (outcome.there, outcome.fetched, web.paths()) == (6, 1, ["/5"])
    assert [row["caption"] for row in written(tmp_path)] == [f"of {at}" for at in range(6)]


def test_the_same_address_twice(web, fetch, tmp_path):
    web.files["/x"] = WebFile(picture("red"))
    assert fetch(["x", "x"]).there == 2 and web.paths() == ["/x"]
    assert len({row["image"] for row in written(tmp_path)}) == 1
