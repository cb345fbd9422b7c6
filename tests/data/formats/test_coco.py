from pathlib import Path

import pytest

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.coco import Coco
from blip2x.data.tables import caption_table
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
    assert rows(path) == [("b.jpg", ("x",), 7, "near-domain"), ("a.jpg", ("one", "two"), 3, ""), ("c.jpg", (), 9, "")]
    assert rows(path, "val2014/{file_name}")[0][0] == "val2014/b.jpg"
    assert rows(path, "val2014/{:06d}.jpg")[0][0] == "val2014/000007.jpg"


def test_images_whose_captions_nobody_knows(write):
    assert [row[:2] for row in rows(write("t.json", {"images": IMAGES}))] == [("b.jpg", ()), ("a.jpg", ()), ("c.jpg", ())]


@pytest.mark.parametrize("template", ["{image_id}.jpg", "{:d.jpg", "{0}{1}", "{file_name:d}", "{file_name.x}", "}"])
def test_templates_that_cannot_be_filled_in_are_named(write, template):
    path = write("c.json", {"images": IMAGES})
    with pytest.raises(
        UserError, match=r"image: '.+' of the split cannot be filled in for .*images 0 .*use {} or {file_name}"
    ) as error:
        rows(path, template)
    assert repr(template) in str(error.value)


def test_an_image_without_captions_is_no_image_of_unknown_ones(write, tmp_path):
    """COCO's own files of captions have none such, so that one is a mistake and not left out."""
    path = write("c.json", {"images": IMAGES, "annotations": ANNOTATIONS})
    with pytest.raises(UserError, match=r"images 2 has no caption, though others have"):
        caption_table(Coco(AnnotationFiles(captions=path), tmp_path), tmp_path / "cache", print)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"c.json must hold an object, not \[\]"),
        ({"annotations": []}, r"c.json must have a list at 'images', not null"),
        ({"images": [{"id": "x"}], "annotations": []}, r"c.json, images 0: 'id' must be an integer, got .x."),
        ({"images": [{"id": 1, "file_name": "../x"}]}, r"images 0: image '../x' lies outside the image folder"),
        ({"images": IMAGES, "annotations": [{"image_id": 3}]}, r"annotations 0 has no 'caption'"),
        ({"images": [{"id": 1}]}, r"images 0: image '' lies outside"),
        ({"images": [{"id": 2**63}]}, r"images 0: 'id' must be a number below 2\*\*63, got 9223372036854775808"),
        ({"images": [{"id": 1, "file_name": "x\ud83d"}]}, r"images 0: image 'x.ud83d' has half a character in it"),
        ({"images": IMAGES[:1], "annotations": ANNOTATIONS}, r"annotations 0 is of image 3, which is not among the 'images'"),
    ],
)
def test_bad_files_are_explained(write, content, message):
    with pytest.raises(UserError, match=message):
        rows(write("c.json", content))
