from pathlib import Path

import pytest

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.coco import Coco
from blip2x.errors import UserError

IMAGES = [
    {"id": 7, "file_name": "b.jpg", "domain": "near-domain"},
    {"id": 3, "file_name": "a.jpg"},
    {"id": 9, "file_name": "c.jpg"},
]
ANNOTATIONS = [
    {"id": 1, "image_id": 3, "caption": "one"},
    {"id": 2, "image_id": 7, "caption": "x"},
    {"id": 3, "image_id": 3, "caption": "two"},
]


def rows(path, image=None):
    return [
        (r.image, r.captions, r.number, r.group)
        for r in Coco(AnnotationFiles(captions=path, image=image), Path("i")).captions()
    ]


def test_images_in_order_with_their_captions(write):
    path = write("c.json", {"images": IMAGES, "annotations": ANNOTATIONS})
    assert rows(path) == [("b.jpg", ("x",), 7, "near-domain"), ("a.jpg", ("one", "two"), 3, "")]
    assert rows(path, "val2014/{file_name}")[0][0] == "val2014/b.jpg"
    assert rows(path, "val2014/{:06d}.jpg")[0][0] == "val2014/000007.jpg"


def test_images_whose_captions_nobody_knows(write):
    assert [row[:2] for row in rows(write("t.json", {"images": IMAGES}))] == [("b.jpg", ()), ("a.jpg", ()), ("c.jpg", ())]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"c.json must hold an object, not \[\]"),
        ({"annotations": []}, r"c.json must have a list at 'images', not null"),
        ({"images": [{"id": "x"}], "annotations": []}, r"c.json, images 0: 'id' must be an integer, got .x."),
        ({"images": [{"id": 1, "file_name": "../x"}]}, r"images 0: image '../x' lies outside the image folder"),
        ({"images": IMAGES, "annotations": [{"image_id": 3}]}, r"annotations 0 has no 'caption'"),
        ({"images": [{"id": 1}]}, r"images 0: image '' lies outside"),
    ],
)
def test_bad_files_are_explained(write, content, message):
    with pytest.raises(UserError, match=message):
        rows(write("c.json", content))
