import io

import numpy as np
import pytest
from PIL import Image

from blip2x.data.pictures import PathImage, decode_picture
from blip2x.errors import UserError


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data, max_pixels=10**8):
    return decode_picture(data, "pic", max_pixels)


def test_photographs_open_as_rgb(photos):
    image = PathImage(photos / "china.jpg", 10**8).open()
    assert image.mode == "RGB" and image.size == (640, 427)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=rf"image {tmp_path}/no.jpg does not exist"):
        PathImage(tmp_path / "no.jpg", 100).open()
    with pytest.raises(UserError, match=rf"image {tmp_path} cannot be read: Is a directory"):
        PathImage(tmp_path, 100).open()


def test_bad_bytes_are_named(photos):
    photo = (photos / "china.jpg").read_bytes()
    with pytest.raises(UserError, match=r"image pic is empty \(0 bytes\)"):
        decode(b"")
    with pytest.raises(UserError, match="pic is not an image that Pillow can read"):
        decode(b"<html>not found</html>")
    with pytest.raises(UserError, match="image pic is corrupt or truncated"):
        decode(photo[: len(photo) // 2])
    png = bytearray(encoded(Image.new("RGB", (40, 40), "red")))
    png[50:60] = bytes(10)
    with pytest.raises(UserError, match="image pic is corrupt or truncated"):
        decode(bytes(png))


def test_every_truncation_is_an_error_of_ours(photos):
    photo = (photos / "china.jpg").read_bytes()
    for end in range(1, len(photo) - 1000, 5003):
        with pytest.raises(UserError):
            decode(photo[:end])


def test_large_pictures_are_refused_before_they_are_decoded():
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(UserError, match=r"20000 x 20000 pixels, more than dataset.max_pixels=100000000"):
        decode(bomb)


def test_our_limit_replaces_pillows(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # raises above 20, warns above 10
    assert decode(encoded(Image.new("L", (5, 5))), max_pixels=25).size == (5, 5)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA"])
def test_modes_become_rgb(mode):
    kind = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    image = decode(encoded(Image.new("RGB", (4, 4), "white").convert(mode), kind))
    assert image.mode == "RGB" and np.asarray(image).min() > 250


def test_transparent_parts_are_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode(encoded(image))).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert np.asarray(decode(encoded(palette, transparency=0))).tolist() == [[[255, 255, 255]]]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    for kind in ("png", "tiff"):
        assert np.asarray(decode(encoded(grey, kind)))[..., 0].tolist() == [[0, 100, 255]]


@pytest.mark.parametrize(("mode", "message"), [("F", "floating-point"), ("I", "32-bit pixels")])
def test_pixels_of_unknown_range_are_refused(mode, message):
    image = Image.new(mode, (2, 2), 70_000)
    with pytest.raises(UserError, match=message):
        decode(encoded(image, "tiff"))


def test_exif_turns_the_picture_upright():
    image = Image.new("RGB", (6, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    assert decode(encoded(image, "jpeg", exif=exif)).size == (2, 6)
