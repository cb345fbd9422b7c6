"""Prompts by file: lines, entries with and without pictures, and what is wrong with a file in one sentence."""

from __future__ import annotations

import pytest

from blip2x.data.prompts import Prompts, read_prompts
from blip2x.errors import UserError

URL = "https://host/x.jpg"


@pytest.fixture
def written(tmp_path):
    """`written(name, content)` -> path of a file beside cat.jpg and more/dog.jpg."""
    (tmp_path / "more").mkdir()
    for name in ("cat.jpg", "more/dog.jpg"):
        (tmp_path / name).touch()

    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "\ufeffwhat, is this?\r\n\n  why?  \n"),
        ("p.jsonl", '{"prompt": "what, is this?"}\n\n{"prompt": " why?"}\n'),
        ("p.csv", 'prompt\n"what, is this?"\nwhy?\n'),
        ("P.CSV", '\ufeffprompt,image\n"what, is this?",\nwhy?,\n'),
    ],
)
def test_the_same_prompts_for_all_pictures(written, name, content):
    assert read_prompts(written(name, content)) == Prompts(["what, is this?", "why?"], {})


def test_each_pictures_own_prompts_relative_to_the_file(written, tmp_path):
    rows = [("more/dog.jpg", "a?"), ("cat.jpg", "b?"), ("./more/dog.jpg", "c?"), (URL, "d?")]
    expected = {f"{tmp_path}/more/dog.jpg": ["a?", "c?"], f"{tmp_path}/cat.jpg": ["b?"], URL: ["d?"]}
    table = "image,prompt\n" + "".join(f"{image},{prompt}\n" for image, prompt in rows)
    lines = "".join(f'{{"prompt": "{prompt}", "image": "{image}"}}\n' for image, prompt in rows)
    for name, content in (("p.csv", table), ("p.jsonl", lines)):
        found = read_prompts(written(name, content))
        assert found == Prompts([], expected) and list(found.own) == list(expected)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("p.txt", " \n\n", r"p.txt has no prompt"),
        ("p.txt", b"\xff\xfe", r"p.txt cannot be read: .*utf-8"),
        ("p.jsonl", "", "p.jsonl has no entries"),
        ("p.jsonl", '{"prompt": "a"', "not valid JSON at line 1"),
        ("p.jsonl", '{"prompt": "a", "question": "b"}', r"line 1 has the unknown key 'question'; known: image, prompt"),
        ("p.csv", "image,text\ncat.jpg,a", r"line 2 has the unknown key 'text'"),
        ("p.csv", "image\ncat.jpg", r"line 2 has no 'prompt'"),
        ("p.csv", "image,prompt\ncat.jpg,a\n,b", r"line 3: either all entries of .*p.csv name an image or none does"),
        (
            "p.jsonl",
            '{"image": "bird.jpg", "prompt": "a"}',
            r"no picture '.*/bird.jpg'; paths are relative to the folder",
        ),
        ("p.jsonl", '{"image": 7, "prompt": "a"}', r"'image' must be a path or an address, got 7"),
        ("p.xlsx", "a", r"p.xlsx: prompts are in a .txt file"),
    ],
)
def test_what_is_wrong_is_one_sentence(written, name, content, sentence):
    with pytest.raises(UserError, match=sentence):
        read_prompts(written(name, content))


def test_a_file_that_is_not_there(tmp_path):
    for name in ("p.txt", "p.csv"):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            read_prompts(str(tmp_path / name))
