import tarfile

import pytest

from blip2x.config.dataset import AnnotationFiles, ImageTextPart, OnBadImage
from blip2x.data.formats.shards import Shards
from blip2x.data.image_text import ImageTextFolder
from blip2x.errors import UserError

COLOURS = ["red", "green", "blue"]


def samples(folder, cache, clean=False):
    part = ImageTextPart(images=str(folder), format="shards")
    return ImageTextFolder(part, cache, OnBadImage.stop, 10**6).captions(AnnotationFiles(captions=str(folder)), clean=clean)


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
            ("a/1.txt", b"beside"),
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


def test_captions_that_nothing_is_left_of_are_none(shard, tmp_path):
    texts = [
        {"caption": "***"},
        {"caption": 5},
        {"caption": None},
        [{"caption": " "}, {"caption": "b"}],
        {"caption": "cut \ud83d"},
    ]
    members = [member for at, text in enumerate(texts) for member in ((f"{at}.jpg", "red"), (f"{at}.json", text))]
    more = [("5.jpg", "red"), ("5.txt", b"..."), ("6.jpg", "red"), ("6.txt", b"caf\xe9"), ("7.jpg", "red")]
    shard("0.tar", [*members, *more, ("7.json", {"width": 3}), ("7.txt", b"not in the other")])
    found = samples(tmp_path / "shards", tmp_path / "cache", clean=True)
    assert [sample.captions for sample in found] == [("b",), ("cut ?",), ("caf\ufffd",), ("not in the other",)]


def test_keys_end_at_the_first_dot(shard, tmp_path):
    other = b"\xe9".decode("utf-8", "surrogateescape")
    members = [
        ("._a.jpg", b"x"),
        ("a.JPG", "red"),
        ("a.mask.png", "blue"),
        ("a.meta.json", b"{"),
        ("._a.txt", b"x"),
        ("a.TXT", b"of a"),
    ]
    more = [("b.1.jpg", "red"), ("b.1.txt", b"no key"), (f"{other}.jpg", "red"), (f"{other}.txt", b"of another encoding")]
    shard("0.tar", [*members, *more])
    found = samples(tmp_path / "shards", tmp_path / "cache")
    assert [(sample.image.name.rpartition("/")[2], sample.captions) for sample in found] == [
        ("a.JPG", ("of a",)),
        (r"\udce9.jpg", ("of another encoding",)),
    ]
    assert found[0].image.open().getpixel((4, 4)) == (254, 0, 0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", "red"), ("a.png", b"")], r"0.tar has a second picture for the key 'a', 'a.png'; remove one"),
        ([("x/a.txt", b""), ("x/a.TXT", b"")], r"0.tar has a second txt for the key 'x/a', 'a.TXT'; remove one"),
        ([("a.1.jpg", "red"), ("a.1.txt", b"a")], r"shards have no picture with a caption, as 1.jpg with 1.txt"),
    ],
)
def test_what_makes_no_samples_is_explained(shard, tmp_path, members, message):
    shard("0.tar", members)
    with pytest.raises(UserError, match=message):
        samples(tmp_path / "shards", tmp_path / "cache")


def rows(folder, captions="*.tar"):
    return list(Shards(AnnotationFiles(captions=captions), folder).captions())


def test_no_cut_and_no_damage_goes_unseen(shard, tmp_path):
    """Only behind a whole member a shard may end, as those of writers that never set the mark of an end."""
    members = [(f"{at}.{ending}", b"x" * 700) for at in range(2) for ending in ("jpg", "txt")]
    path = shard("0.tar", members)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = {member.offset_data + 1024 for member in tar}
    marked = max(ends) + 512
    for cut in range(0, len(whole), 256):
        path.write_bytes(whole[:cut])
        if cut in ends - {min(ends)} or cut >= marked:
            assert len(rows(path.parent)) == (2 if cut >= max(ends) else 1), cut
        else:
            with pytest.raises(UserError, match=r"is cut off|have no picture"):
                rows(path.parent)
    for place in sorted(ends - {max(ends)}):
        path.write_bytes(whole[: place + 100] + b"damage" + whole[place + 106 :])
        with pytest.raises(UserError, match=rf"0.tar is cut off .*no header at byte {place}"):
            rows(path.parent)


def test_a_folder_is_no_shard(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"shard .*x.tar cannot be read: Is a directory"):
        rows(tmp_path)


def test_brackets_in_the_image_folder_are_no_pattern(shard, tmp_path):
    path = shard("0.tar", [("1.jpg", "red"), ("1.txt", b"x")])
    folder = path.parent.rename(tmp_path / "data[1]")
    assert [row.image for row in rows(folder, "[0-9].tar")] == ["0.tar/1.jpg"]
