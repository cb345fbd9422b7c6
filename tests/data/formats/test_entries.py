import os
from pathlib import Path

import pytest
from PIL import Image

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.entries import Entries, trailing_number
from blip2x.errors import UserError


def captions(path, images="images"):
    return list(Entries(AnnotationFiles(captions=str(path)), Path(images)).captions())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'image,caption,image_id\nx/1.jpg,"a cat, asleep",7\n\nx/1.jpg,"a\nline",7\n'),
        ("a.tsv", 'image\tcaption\timage_id\nx/1.jpg\ta cat, asleep\t7\nx/1.jpg\t"a\nline"\t7\n'),
        (
            "a.jsonl",
            '{"image": "x/1.jpg", "caption": ["a cat, asleep"], "image_id": 7}\n'
            '{"image": "x/1.jpg", "caption": "a\\nline", "image_id": 7}',
        ),
    ],
)
def test_tables_and_lines_give_the_same(write, name, text):
    rows = captions(write(name, text))
    assert [(row.image, row.captions, row.number) for row in rows] == [
        ("x/1.jpg", ("a cat, asleep",), 7),
        ("x/1.jpg", ("a\nline",), 7),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,caption\na.jpg\n", r"a.csv, line 2 has 1 columns, but the first line has 2"),
        ('image,caption\na.jpg,"x\n', r"a.csv is no valid csv file at line"),
        ("image,caption\n", r"a.csv has no entries"),
        ("", r"a.csv has no entries"),
        ("image,caption,caption\na.jpg,a,b\n", r"a.csv has two columns named 'caption' in its first line"),
        ("image,text\na.jpg,x\n", r"a.csv, line 2 has no 'caption'; its keys: 'image', 'text'"),
        ("image,caption\na.jpg,\n", r"a.csv, line 2 has no 'caption'; its keys: 'image'"),
    ],
)
def test_bad_tables_are_explained(write, text, message):
    with pytest.raises(UserError, match=message):
        captions(write("a.csv", text))


def test_questions_of_a_table(write):
    path = write("q.csv", "image,question,answer,question_id\na.jpg,What is it?,a cat,x\nb.jpg,Is it?,yes,07\n")
    first, second = Entries(AnnotationFiles(questions=path), Path("images")).questions()
    assert (first.question, first.answers, first.question_type, first.question_id) == ("What is it?", ("a cat",), "what", None)
    assert second.question_id == 7


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, "9" * 5000])
def test_numbers_of_more_than_64_bits_are_named(write, number):
    path = write("q.json", [{"image": "a.jpg", "question": "Is it?", "question_id": number}])
    with pytest.raises(UserError, match=r"entry 0: 'question_id' must be a number below 2\*\*63, got -?9"):
        list(Entries(AnnotationFiles(questions=path), Path("images")).questions())


def test_nocaps_of_blip(write):
    path = write("n.json", [{"image": "val/0013ea.jpg", "img_id": 4499, "caption": ["x"] * 10, "domain": "out-domain"}])
    (row,) = captions(path)
    assert (row.number, row.group, len(row.captions)) == (4499, "out-domain", 10)


def test_texts_beside_pictures(tmp_path):
    images = tmp_path / "images"
    (images / "cats" / "more").mkdir(parents=True)
    for name in ("cats/2.jpg", "cats/more/10.PNG", "cats/alone.jpg", "dog.jpg"):
        Image.new("RGB", (4, 4)).save(images / name)
    (images / "cats/2.txt").write_text("a cat\n\n the same cat \n")
    (images / "cats/more/10.txt").write_text("another")
    (images / "dog.txt").write_text("a dog")
    rows = captions(images / "cats", images)
    assert [(row.image, row.captions, row.number) for row in rows] == [
        ("cats/2.jpg", ("a cat", "the same cat"), 2),
        ("cats/more/10.PNG", ("another",), 10),
    ]
    before = Entries(AnnotationFiles(captions=str(images / "cats")), images).files()
    assert os.path.join(images, "cats/2.txt") in map(str, before)  # a changed text is seen
    assert {images / "cats", images / "cats/more"} <= set(before)  # and a picture that is added to one that is there
    assert [row.image for row in captions(images, images)] == ["dog.jpg", "cats/2.jpg", "cats/more/10.PNG"]
    (images / "cats/2.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"cats/2.txt has no caption; write one per line"):
        captions(images / "cats", images)
    with pytest.raises(UserError, match="more/deep has no picture with a text file"):
        (images / "cats/more/deep").mkdir()
        captions(images / "cats/more/deep", images)
    with pytest.raises(UserError, match="lies outside the image folder"):
        captions(images / "cats/more", images / "cats" / "more" / "deep")


def test_numbers_at_the_end():
    assert [trailing_number(text) for text in ("coco_522418", "0012", "x", "1" * 20)] == [522418, 12, None, int("1" * 12)]
