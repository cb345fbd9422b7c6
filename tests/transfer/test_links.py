from __future__ import annotations

import json
import tracemalloc

import pytest

from blip2x.errors import UserError
from blip2x.transfer import links as module
from blip2x.transfer.links import Link, read_links

TWO = [Link("http://a/1.jpg", "a cat, and\ta dog", None), Link("https://b/2?x=[1]", "ein Käse \u2028 {", None)]


@pytest.fixture
def write(tmp_path):
    def call(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return call


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [1, 7, 64, 2**20])
def test_json_lists_are_read_in_pieces(indent, piece, write, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    rows = [{"url": link.url, "caption": link.caption, "more": [1, {"x": "]"}]} for link in TWO] * 3
    assert list(read_links(write("x.json", json.dumps(rows, indent=indent)))) == TWO * 3
    assert list(read_links(write("x.json", "\n[ ]\n"))) == []


def test_other_forms(write):
    rows = [{"url": link.url, "caption": link.caption} for link in TWO]
    assert list(read_links(write("x.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n"))) == TWO
    assert list(read_links(write("cc3m.tsv", "a cat\thttp://a/1.jpg\r\n"))) == [Link("http://a/1.jpg", "a cat", None)]
    assert list(read_links(write("cc12m.tsv", "http://a/1.jpg\tsee http://b\n"))) == [
        Link("http://a/1.jpg", "see http://b", None)
    ]
    messy = write("messy.tsv", "a cat\thttp://a/1.jpg\n\ntwo\tcats\tno address\n")
    assert list(read_links(messy)) == [Link("http://a/1.jpg", "a cat", None), Link("no address", "two cats", None)]
    images = [{"id": 0, "coco_url": "https://a/x.jpg", "file_name": "0013ea2087020901.jpg"}]
    assert list(read_links(write("n.json", json.dumps({"images": images, "annotations": []})))) == [
        Link("https://a/x.jpg", None, "0013ea2087020901.jpg")
    ]


def test_halves_of_characters_become_question_marks(write):
    path = write("x.json", r'[{"url": "http://a/\ud83d", "caption": "cut emoji \ud83d"}]')
    (link,) = read_links(path)
    assert link == Link("http://a/?", "cut emoji ?", None) and len(link.key) == 24


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.json", '[{"url": "http://a"}, {"url": null}]', "entry 1 has no web address"),
        ("x.json", '[{"image": "a.jpg"}]', "entry 0 has no web address"),
        ("x.json", '[{"url": "http://a"}, ["http://b"]]', "entry 1 has no web address"),
        ("x.json", '[{"url": "http://a", "caption": 3}]', "entry 0 has a 'caption' that is no text: 3"),
        ("x.json", '[{"url": "http://a"}, {"url": "htt', "is broken, or was cut off"),
        ("x.json", '[{"url": "http://a"}', "is broken, or was cut off"),
        ("x.json", "", "is neither a JSON list nor COCO's format"),
        ("x.json", "<html>", "it begins with '<html>'"),
        ("x.json", "{}", "has no list of 'images'"),
        ("x.json", "{", "is no JSON"),
        ("x.jsonl", '{"url": "http://a"}\nx', "line 2 is no JSON"),
        ("x.tsv", "a\thttp://a\nb\n", "line 2 is not a caption and a web address"),
        ("x.tsv", "a\tb\n", "line 1 is not a caption and a web address"),
        *(
            ("x.json", json.dumps({"images": [{"coco_url": "http://a", "file_name": name}]}), "which is no plain name")
            for name in ("../x.jpg", "/x.jpg", "a/b.jpg", ".links.tsv", "a\\b", "x\n", "")
        ),
    ],
)
def test_mistakes(name, text, said, write):
    with pytest.raises(UserError, match=said):
        list(read_links(write(name, text)))


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(UserError, match=r"x.json cannot be read: No such file"):
        list(read_links(tmp_path / "x.json"))
    (tmp_path / "x.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(UserError, match=r"x.json cannot be read: 'utf-8' codec"):
        list(read_links(tmp_path / "x.json"))


def test_long_lists_are_never_in_memory(write, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 2**12)
    path = write("x.json", json.dumps([{"url": f"http://a/{at}.jpg", "caption": "x" * 100} for at in range(5000)]))
    tracemalloc.start()
    assert sum(1 for _ in read_links(path)) == 5000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000 < path.stat().st_size
