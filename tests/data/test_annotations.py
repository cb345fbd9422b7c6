import pytest

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
