"""Opening pictures in other processes, and what is in shards."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from blip2x.data.audit.pictures import CHUNK, Broken, Facts, inspect, inspect_all
from blip2x.data.pictures import PathImage
from blip2x.data.shards import StoredImage


def test_processes_say_the_same_in_the_same_order(picture, tmp_path):
    names = [picture(f"{n}.png", n) for n in range(5)] + ["gone.png"]
    pictures = [PathImage(tmp_path / "images" / names[n % 6], 10**6) for n in range(2 * CHUNK + 3)]
    alone = list(inspect_all(pictures, 0))
    assert [len(chunk) for chunk in alone] == [CHUNK, CHUNK, 3]
    assert list(inspect_all(pictures, 1)) == alone
    assert isinstance(alone[0][5], Broken) and "gone.png does not exist" in alone[0][5].sentence


def test_picture_in_a_shard_is_the_same_as_its_file(scene, tmp_path):
    file = io.BytesIO()
    scene(1).save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    (tmp_path / "shard").write_bytes(b"before" + file.getvalue() + b"behind")
    stored = StoredImage(tmp_path / "shard", 6, len(file.getvalue()), "a.png", 10**6)
    assert inspect(stored) == inspect(PathImage(tmp_path / "a.png", 10**6))


@pytest.mark.parametrize("quality", [50, 90])
@pytest.mark.parametrize("side", [64, 96, 150])
def test_a_copy_with_other_bytes_looks_the_same(scene, tmp_path, quality, side):
    scene(3, 128).save(tmp_path / "a.png")
    scene(3, 128).resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / "b.jpg", quality=quality)
    first, second = (inspect(PathImage(tmp_path / name, 10**6)) for name in ("a.png", "b.jpg"))
    assert first.content != second.content
    assert bin(first.shape ^ second.shape).count("1") <= 2
    small = [np.frombuffer(facts.small, dtype=np.uint8).astype(int) for facts in (first, second)]
    assert np.abs(small[0] - small[1]).max() <= 4
    assert bin(first.shape ^ inspect_scene(scene(4), tmp_path).shape).count("1") > 10


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("exif", [b"garbage" * 9, b"Exif\0\0XX*\0\x08\0\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_a_camera_note_that_cannot_be_read_is_no_reason_to_stop(scene, tmp_path, suffix, exif):
    path = tmp_path / f"a.{suffix}"
    scene(1).save(path, exif=exif)
    found = inspect(PathImage(path, 10**6))
    assert isinstance(found, Facts) and not found.rotated


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError("y"), SyntaxError("z")])
def test_whatever_a_picture_raises_it_is_a_broken_one(error):
    class Painted:
        name = "painted"

        def open(self):
            raise error

    (found,) = next(inspect_all([Painted()], 0))
    assert isinstance(found, Broken) and "painted cannot be looked at" in found.sentence


def test_a_file_is_read_once(picture, tmp_path, monkeypatch):
    path, reads = tmp_path / "images" / picture("a.jpg", 1), []
    read_bytes = type(path).read_bytes
    monkeypatch.setattr(type(path), "read_bytes", lambda self: reads.append(self) or read_bytes(self))
    assert inspect(PathImage(path, 10**6)).mode == "RGB"
    assert reads == [path]


def test_a_path_that_no_system_takes_is_a_broken_picture(tmp_path):
    found = inspect(PathImage(tmp_path / "a\0b.jpg", 10**6))
    assert isinstance(found, Broken) and "cannot be read" in found.sentence


def inspect_scene(image, folder):
    image.save(folder / "c.png")
    return inspect(PathImage(folder / "c.png", 10**6))
