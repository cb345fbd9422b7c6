import json
import os
import tracemalloc

import pytest

from blip2x.data import annotations
from blip2x.data.annotations import read_entries
from blip2x.errors import UserError


def test_lists_and_lines_are_read(write):
    for name, text in (
        ("a.json", '[{"caption": "x"}, {"caption": "y"}]'),
        ("a.jsonl", '{"caption": "x"}\n\n{"caption": "y"}\n'),
    ):
        assert [entry.text("caption") for entry in read_entries(write(name, text))] == ["x", "y"]


def test_a_byte_order_mark_is_no_error(write):
    assert len(list(read_entries(write("bom.json", '\ufeff[{"caption": "x"}]')))) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"caption": "x"},\n{"caption" "y"}]', r"a.json is not valid JSON at line 2, column 12"),
        ("a.jsonl", '{"caption": "x"}\n{"caption": ', r"a.jsonl is not valid JSON at line 2, column"),
        ("a.json", "", r"a.json is not valid JSON at line 1"),
        ("a.json", "[]", r"a.json has no entries"),
        ("a.jsonl", "\n", r"a.jsonl has no entries"),
        ("a.json", '{"questions": []}', r"must hold a list of entries, not .*questions"),
        ("a.json", '[{"caption": "x"}, "y"]', r"a.json, entry 1 must be an object .* got .y"),
        (
            "a.json",
            '{"caption": "x"}\n{"caption": "y"}',
            r"must hold a list of entries, not {.*one object per line needs the suffix",
        ),
        ("a.json", '[{"caption": "x"}] x', r"a.json is not valid JSON at line 1, column 20: Extra data"),
        (
            "a.json",
            '[{"caption": "x"}\n {"caption": "y"}]',
            r"a.json is not valid JSON at line 2, column 2: Expecting ',' delimiter",
        ),
        ("a.json", '[{"caption": ' + "9" * 5000 + "}]", r"annotation file .*a.json cannot be read: Exceeds the limit"),
        ("a.json", "[" * 100_000, r"a.json is nested too deeply"),
    ],
)
def test_bad_files_are_explained(write, name, text, message):
    with pytest.raises(UserError, match=message):
        list(read_entries(write(name, text)))


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"annotation file .*no.json does not exist"):
        list(read_entries(tmp_path / "no.json"))
    (tmp_path / "bin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"annotation file .*bin.json cannot be read"):
        list(read_entries(tmp_path / "bin.json"))


@pytest.mark.parametrize("value", ["3", "null", "[]", '["x", 3]', "{}"])
def test_values_of_another_type_are_named(write, value):
    (entry,) = read_entries(write("a.json", f'[{{"caption": {value}}}]'))
    with pytest.raises(UserError, match="entry 0: 'caption' must be a text or a list of texts"):
        entry.texts("caption")


def test_one_text_is_one(write):
    (entry,) = read_entries(write("a.jsonl", '{"question": ["a", "b"], "image": 5}'))
    with pytest.raises(UserError, match=r"a.jsonl, line 1: 'question' must be one text"):
        entry.text("question")
    with pytest.raises(UserError, match=r"'image' must be the path of a file .* got 5"):
        _ = entry.image


def test_halves_of_characters_become_question_marks(write):
    (entry,) = read_entries(
        write("a.json", r'[{"caption": "cut emoji \ud83d", "image": "\ud83d.jpg", "domain": "\ud83d\ude00\ud83d"}]')
    )
    assert (entry.text("caption"), entry.label("domain", "")) == ("cut emoji ?", "\U0001f600?")
    with pytest.raises(UserError, match=r"entry 0: image '.ud83d.jpg' has half a character in it"):
        _ = entry.image


@pytest.mark.parametrize("chunk", [7, 1000, 1 << 22])
@pytest.mark.parametrize("broken", ['{"caption" "y"}', '{"caption": "y"', '"y', "y", '{"caption": "y"} 5'])
def test_a_fault_in_a_list_is_found_where_the_parser_of_a_whole_one_finds_it(write, monkeypatch, broken, chunk):
    text = "[\n" + '{"caption":\n "x"} ,\n  ' * 30 + broken + "\n"
    with pytest.raises(json.JSONDecodeError) as told:
        json.loads(text)
    monkeypatch.setattr(annotations, "_CHUNK", chunk)
    where = f"a.json is not valid JSON at line {told.value.lineno}, column {told.value.colno}: "
    with pytest.raises(UserError, match=where):
        list(read_entries(write("a.json", text)))


def test_a_list_that_is_cut_off_is_not_read_as_a_whole(write, monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK", 1 << 10)
    path = write("a.json", "[" + ('{"caption": "' + "x" * 500 + '"},\n') * 2000)
    tracemalloc.start()
    with pytest.raises(UserError, match="at line 2001, column 1: Expecting value"):
        for _ in read_entries(path):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000 < os.path.getsize(path)
