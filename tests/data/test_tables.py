"""Tables made from annotation files: made once, opened at once, made anew when something changes."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import numpy as np
import pytest

from blip2x.config.dataset import AnnotationFiles, ImageTextPart, OnBadImage
from blip2x.data import presence, tables
from blip2x.data.image_text import ImageTextFolder
from blip2x.data.samples import has_truth
from blip2x.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """`folder(**changes)`: an `ImageTextFolder` on images/0.jpg to images/9.jpg, which need no content."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(10):
        (images / f"{number}.jpg").touch()

    def make(**changes):
        part = ImageTextPart(images=str(images), **{k: v for k, v in changes.items() if k == "format"})
        return ImageTextFolder(part, tmp_path / "cache", changes.get("on_bad_image", OnBadImage.stop), 10**8)

    return make


@pytest.fixture
def reads(monkeypatch):
    """The number of tables that were made."""
    made, block = [], tables._blocks

    def count(rows, what, say):
        made.append(what)
        return block(rows, what, say)

    monkeypatch.setattr(tables, "_blocks", count)
    return made


def test_files_are_read_once_and_anew_when_they_change(folder, write, reads, tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": f"number {i}"} for i in range(3)]
    files = AnnotationFiles(captions=write("a.json", rows))
    for _ in range(2):
        assert [sample.captions for sample in folder().captions(files, clean=False)] == [(f"number {i}",) for i in range(3)]
    assert len(reads) == 1
    folder().captions(files, clean=True)  # the same table, cleaned as it is read
    assert len(reads) == 1
    write("a.json", rows[:1])
    assert len(folder().captions(files, clean=False)) == 1 and len(reads) == 2
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]  # no draft, no lock


def test_a_table_that_is_cut_off_while_it_is_written_is_none(folder, write, monkeypatch, tmp_path):
    files = AnnotationFiles(captions=write("a.json", [{"image": "0.jpg", "caption": "x"}]))

    def break_off(table, file):
        file.write(b"ARROW1")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_write_table", break_off)
        with pytest.raises(KeyboardInterrupt):
            folder().captions(files, clean=False)
    assert len(folder().captions(files, clean=False)) == 1


def test_a_cache_that_cannot_be_written_is_named(folder, write, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache/.* cannot be written: .*; set paths.cache"):
        folder().captions(AnnotationFiles(captions=write("a.json", [{"image": "0.jpg", "caption": "x"}])), clean=False)


@pytest.mark.parametrize("blocks", [1, 2, 100])
def test_rows_of_one_image_are_joined_wherever_they_stand(folder, write, monkeypatch, blocks):
    monkeypatch.setattr(tables, "_ROWS", blocks)
    rng = random.Random(0)
    rows = [{"image": f"{rng.randrange(10)}.jpg", "caption": [f"c{i}"] * rng.randrange(1, 3)} for i in range(40)]
    wanted: dict[str, list[str]] = {}
    for row in rows:
        wanted.setdefault(row["image"], []).extend(row["caption"])
    samples = folder().captions(AnnotationFiles(captions=write("a.json", rows)), clean=False)
    found = [(os.path.basename(sample.image.name), sample.captions) for sample in samples]
    assert found == [(image, tuple(dict.fromkeys(captions))) for image, captions in wanted.items()]
    assert [sample.image_id for sample in samples] == [int(image[0]) for image in wanted]


def test_missing_images_are_looked_for_again_when_the_folder_changes(folder, write, tmp_path, monkeypatch):
    files = AnnotationFiles(captions=write("a.json", [{"image": f"{i}.jpg", "caption": "x"} for i in range(10)]))
    lenient = folder(on_bad_image=OnBadImage.skip)
    listings, listing = [], presence._listing
    monkeypatch.setattr(presence, "_listing", lambda path: listings.append(path) or listing(path))
    assert len(lenient.captions(files, clean=False)) == len(lenient.captions(files, clean=False)) == 10
    assert len(listings) == 1
    (tmp_path / "images" / "3.jpg").unlink()
    os.utime(tmp_path / "images", ns=(1, 1))  # whatever the clock's resolution
    found = lenient.captions(files, clean=False)
    assert [sample.image_id for sample in found] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert lenient.skipped == [f"image {tmp_path}/images/3.jpg does not exist"]


def test_images_may_be_anywhere_else_the_next_time(folder, write, tmp_path):
    files = AnnotationFiles(captions=write("a.json", [{"image": "0.jpg", "caption": "x"}]))
    here = folder()
    assert len(here.captions(files, clean=False)) == 1
    (tmp_path / "empty").mkdir()
    elsewhere = replace(here, part=replace(here.part, images=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="1 of 1 images"):
        elsewhere.captions(files, clean=False)


def test_a_split_without_truth_is_told_from_a_forgotten_caption(folder, write):
    bare = [{"image": f"{i}.jpg", "image_id": i} for i in range(3)]
    samples = folder().captions(AnnotationFiles(captions=write("test.json", bare)), clean=False)
    assert not has_truth(samples) and [sample.captions for sample in samples] == [()] * 3
    with pytest.raises(UserError, match=r"test.json has no caption to train on"):
        folder().captions(AnnotationFiles(captions=write("test.json", bare)), clean=True)
    with pytest.raises(UserError, match=r"mixed.json, entry 1 has no caption, though others have"):
        folder().captions(AnnotationFiles(captions=write("mixed.json", [{**bare[0], "caption": "x"}, bare[1]])), clean=False)
    asked = [{"image": "0.jpg", "question": "what?", "question_id": 5}]
    questions = folder().questions(AnnotationFiles(questions=write("q.json", asked)))
    assert not has_truth(questions) and questions[0].answers == ()
    with pytest.raises(UserError, match=r"entry 0 has no 'answer'; its keys: 'image', 'question', 'anwser'"):
        folder().questions(AnnotationFiles(questions=write("q2.json", [{"image": "0.jpg", "question": "w?", "anwser": "x"}])))


def test_numbers_are_the_files_or_counted(folder, write):
    rows = [{"image": "3.jpg", "caption": "x"}, {"image": "1.jpg", "caption": "y"}]
    ids = folder().captions(AnnotationFiles(captions=write("a.json", rows)), clean=False).image_id_N
    assert ids.tolist() == [3, 1] and ids.dtype == np.int64
    rows[0]["image_id"], rows[1]["image_id"] = "none", "x_7"
    assert folder().captions(AnnotationFiles(captions=write("b.json", rows)), clean=False).image_id_N.tolist() == [0, 1]


def test_a_broken_cache_is_made_anew(folder, write, reads, tmp_path):
    files = AnnotationFiles(captions=write("a.json", [{"image": "0.jpg", "caption": "x"}]))
    folder().captions(files, clean=False)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])  # as a power failure leaves it
    assert len(folder().captions(files, clean=False)) == 1 and len(reads) == 2
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"")
    assert len(folder().captions(files, clean=False)) == 1 and len(reads) == 3


def test_only_folders_that_changed_are_listed_again(folder, write, tmp_path, monkeypatch):
    names = [f"{part}/{i}.jpg" for part in ("a", "b/c", "d") for i in range(3)]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "a" / "1.jpg").unlink()
    files = AnnotationFiles(captions=write("a.json", [{"image": name, "caption": "x"} for name in ("0.jpg", *names)]))
    lenient = folder(on_bad_image=OnBadImage.skip)
    assert len(lenient.captions(files, clean=False)) == 9
    listed, listing = [], presence._listing
    monkeypatch.setattr(presence, "_listing", lambda path: listed.append(path.name) or listing(path))
    (tmp_path / "images" / "b" / "c" / "2.jpg").unlink()
    os.utime(tmp_path / "images" / "b" / "c", ns=(1, 1))
    found = lenient.captions(files, clean=False)
    assert listed == ["c"] and len(found) == 8
    gone = {os.path.relpath(sentence.split()[1], tmp_path / "images") for sentence in lenient.skipped}
    assert gone == {"a/1.jpg", "b/c/2.jpg"}


def test_captions_of_punctuation_are_left_out_where_skipping_is_allowed(folder, write):
    rows = [
        {"image": "0.jpg", "caption": ["...", "a cat"]},
        {"image": "1.jpg", "caption": "!!!"},
        {"image": "2.jpg", "caption": "b"},
    ]
    files = AnnotationFiles(captions=write("a.json", rows))
    with pytest.raises(UserError, match=r"entry 1: 'caption' is empty but for punctuation"):
        folder().captions(files, clean=True)
    samples = folder(on_bad_image=OnBadImage.skip).captions(files, clean=True)
    assert samples[0].captions == ("a cat",) and samples[2].captions == ("b",)
    with pytest.raises(UserError, match=r"image .*1.jpg has no caption but punctuation"):  # a loader counts it and goes on
        _ = samples[1]
