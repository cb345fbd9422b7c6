import pytest

from blip2x.config.dataset import AnnotationFiles, ImageTextPart, OnBadImage
from blip2x.data.image_text import ImageTextFolder
from blip2x.errors import UserError

COLOURS = ["red", "green", "blue"]


def samples(folder, cache):
    part = ImageTextPart(images=str(folder), format="shards")
    return ImageTextFolder(part, cache, OnBadImage.stop, 10**6).captions(AnnotationFiles(captions=str(folder)), clean=False)


def test_pictures_and_captions_are_found_in_their_shards(shard, tmp_path):
    first = [
        (f"{i:05d}.{suffix}", content)
        for i in range(3)
        for suffix, content in (("jpg", COLOURS[i]), ("json", {"caption": f"c{i}"}))
    ]
    shard("00000.tar", [*first, ("00003.json", {"caption": "no picture"}), ("00004.jpg", "red"), ("__license.md", b"free")])
    shard(
        "00001.tar",
        [
            ("a/1.b.txt", b"beside"),
            ("a/1.jpg", "white"),
            ("a/2.json", [{"caption": "x"}, {"caption": "y"}, {"caption": "z"}]),
            ("a/2.jpg", "black"),
        ],
    )
    found = samples(tmp_path / "shards", tmp_path / "cache")
    assert [sample.captions for sample in found] == [("c0",), ("c1",), ("c2",), ("beside",), ("x", "y")]
    assert [sample.image.open().getpixel((4, 4)) for sample in found][:2] == [(254, 0, 0), (0, 128, 1)]
    assert found[2].image.name == f"{tmp_path}/shards/00000.tar/00002.jpg"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:700]), r"00000.tar is cut off or no plain tar file"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(600)), r"00000.tar is cut off or no plain tar file"),
        (lambda path: path.unlink(), r"shards has no shard; give a folder of .tar files"),
    ],
)
def test_broken_shards_are_named(shard, tmp_path, break_it, message):
    break_it(shard("00000.tar", [("1.jpg", "red"), ("1.json", {"caption": "x"})]))
    with pytest.raises(UserError, match=message):
        samples(tmp_path / "shards", tmp_path / "cache")


def test_a_text_that_cannot_be_read_is_named(shard, tmp_path):
    shard("00000.tar", [("1.jpg", "red"), ("1.json", b"{")])
    with pytest.raises(UserError, match=r"00000.tar, 1.jpg: the text beside it cannot be read"):
        samples(tmp_path / "shards", tmp_path / "cache")
