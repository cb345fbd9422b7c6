"""Rows of predictions as a table: bounded in rows, pixels and characters."""

from __future__ import annotations

from PIL import Image

from blip2x.engine.loggers._table import LONGER_SIDE, make_table


def test_pictures_come_first_and_are_small(rows):
    table = make_table(*rows, 64, str.upper)
    assert table.columns == ["image", "attention", "caption", "references", "scores/CIDEr"]
    assert table.rows[0][0].size == (LONGER_SIDE, LONGER_SIDE // 2) and table.rows[0][1].size == (8, 8)
    assert table.rows[1][1:] == [None, "A BLUE WALL", "A WALL | BLUE", 0.5]
    assert len(table.rows) == 2  # what has no picture is left out where others have one


def test_at_most_so_many_evenly_chosen_and_texts_cut(tmp_path):
    found = [{"caption": "x" * 9999, "number": number} for number in range(10)]
    table = make_table(found, tmp_path, 4, str)
    assert [row[1] for row in table.rows] == [0, 2, 5, 7] and {len(row[0]) for row in table.rows} == {2000}
    assert make_table([], tmp_path, 4, str).rows == []


def test_what_a_search_found_is_said_in_short(tmp_path):
    by_picture = {"image": None, "rank": 2, "retrieved_texts": [{"text": f"text {n}", "right": n == 1} for n in range(10)]}
    by_text = {"text": "a wall", "rank": 1, "retrieved_images": [{"name": "coco/1", "image": None, "right": True}]}
    assert make_table([by_picture], tmp_path, 4, str).rows == [["text 0 | text 1 ✓ | text 2", 2]]
    assert make_table([by_text], tmp_path, 4, str).rows == [["a wall", "coco/1 ✓", 1]]


def test_a_text_is_shown_with_the_pictures_it_found(rows):
    _, folder = rows
    found = [{"name": name, "image": name} for name in ("1.png", "2.png", "3.png", "1.png")]
    others = [{"text": "b", "rank": 1, "retrieved_images": [{"name": "x", "image": None}]}]
    table = make_table([*others, {"text": "a", "rank": 1, "retrieved_images": found}], folder, 1, str)
    assert table.columns == ["text", "retrieved_images", "found/1", "found/2", "rank"]  # the third cannot be read
    assert [cell.size for cell in table.rows[0][2:4]] == [(320, 160), (20, 10)]


def test_questions_and_predictions_have_their_columns(tmp_path):
    asked = {"image": None, "question": "what?", "answers": ["a", "b"], "correct": 1.0, "prediction": "a", "blind": "b"}
    assert make_table([asked], tmp_path, 4, str).columns == ["question", "prediction", "answers", "correct", "blind"]
    described = {"source": "x.jpg", "prompt": "a photo of", "texts": ["a", "b"], "scores": [-0.25, -1.0], "image": None}
    table = make_table([described], tmp_path, 4, str)
    assert table.columns == ["source", "prompt", "texts", "scores"] and table.rows[0][2:] == ["a | b", "-0.250 | -1.000"]


def test_a_broken_or_absent_picture_is_an_empty_cell(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    found = [{"image": name, "caption": "a"} for name in ("broken.png", "absent.png", Image.new("RGB", (2, 2)))]
    table = make_table(found, tmp_path, 4, str)
    assert [row[0] is None for row in table.rows] == [True, True, False]
