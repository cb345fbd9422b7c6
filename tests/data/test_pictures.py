import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip2x.data import pictures
from blip2x.data.pictures import Crop, PathImage, decode_picture
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
    with pytest.raises(UserError, match=r"cannot be read: embedded null byte"):
        PathImage(tmp_path / "a\0b.jpg", 100).open()


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
    bomb = png(20_000, 20_000, 1, 0, bytes(20_000 * 2501))
    assert len(bomb) < 100_000
    with pytest.raises(UserError, match=r"20000 x 20000 pixels, more than dataset.max_pixels=100000000"):
        decode(bomb)


OLD = int(Image.__version__.split(".")[0]) < 13


@pytest.mark.parametrize("kind", ["gif", pytest.param("webp", marks=pytest.mark.skipif(OLD, reason="Pillow 12 does not look"))])
def test_pictures_that_take_memory_when_they_are_opened_are_refused_before(kind, monkeypatch):
    data = bytearray(encoded(Image.new("RGB", (8, 8), "red"), kind, **({"lossless": True} if kind == "webp" else {})))
    if kind == "gif":  # its only frame, to be removed when it was shown
        frame = data.index(b"\x2c")
        data[frame:frame] = b"\x21\xf9\x04\x08\0\0\0\0"
        data[frame + 8 + 5 : frame + 8 + 9] = b"\xff\xff\xff\xff"
        data[6:10] = b"\xff\xff\xff\xff"
        monkeypatch.setattr(Image.core, "fill", lambda *_: pytest.fail("memory is taken"))
    else:  # 14 bits of width and of height, each less by one, behind a signature
        start = data.index(b"VP8L") + 9
        data[start : start + 4] = struct.pack("<I", 16_382 | 16_382 << 14)
        monkeypatch.setattr("PIL._webp.WebPAnimDecoder", lambda *_: pytest.fail("memory is taken"))
    with pytest.raises(UserError, match=r"pic has more than twice as many pixels as dataset.max_pixels=100000;"):
        decode(bytes(data), max_pixels=10**5)


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


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, row, *chunks):
    """A PNG, mostly of one row, that Pillow would not write; `colour`: 0 grey, 2 RGB, 4 grey and alpha."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, content, chunk(b"IEND", b"")])


def tiff(bits, kind, order, content, white=1):
    """A TIFF of two grey pixels; `kind`: 1 unsigned, 2 signed, 3 floating-point."""
    tags = [
        (256, 2),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, white),
        (273, 134),
        (277, 1),
        (278, 1),
        (279, len(content)),
        (339, kind),
    ]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return start + struct.pack(order + "IH", 8, len(tags)) + entries + struct.pack(order + "I", 0) + content


ORANGE, BLUE, WHITE = (255, 128, 0), (0, 0, 255), (255, 255, 255)


def orange(mode="RGB"):
    return Image.new("RGB", (8, 8), ORANGE).convert(mode)


def several(kind, **options):
    return encoded(orange(), kind, save_all=True, append_images=[Image.new("RGB", (8, 8), BLUE)], **options)


def cmyk(*, adobe=True):
    """As Adobe writes it: inverted."""
    data = encoded(orange("CMYK"), "jpeg", quality=100)
    if adobe:
        return data
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] :]


def ycck():
    """Inverted colours as luminance and chroma, and inverted black, as Adobe's marker says where its last byte is 2."""
    planes = Image.new("RGB", (8, 8), tuple(255 - value for value in ORANGE)).convert("YCbCr").split()
    inverted = [plane.point(lambda value: 255 - value) for plane in planes]  # Pillow turns them round as it writes
    data = bytearray(encoded(Image.merge("CMYK", [*inverted, Image.new("L", (8, 8))]), "jpeg", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


SHOWN = {  # what Pillow and its formats have, and the first two pixels as they have to come out
    "CMYK": (cmyk, [ORANGE, ORANGE]),
    "CMYK without Adobe's marker": (lambda: cmyk(adobe=False), [ORANGE, ORANGE]),
    "YCCK": (ycck, [ORANGE, ORANGE]),
    "JPEG in RGB": (lambda: encoded(orange(), "jpeg", quality=100, keep_rgb=True), [ORANGE, ORANGE]),
    "JPEG within TIFF": (lambda: encoded(orange(), "tiff", compression="jpeg"), [ORANGE, ORANGE]),
    "palette": (lambda: encoded(orange().quantize(2)), [ORANGE, ORANGE]),
    "palette with an alpha": (lambda: encoded(Image.new("RGBA", (8, 8), (0, 0, 255, 51)).quantize(4)), [(204, 204, 255)] * 2),
    "1 bit": (lambda: encoded(Image.new("1", (8, 8), 1)), [WHITE, WHITE]),
    "1 bit, a value not shown": (lambda: png(2, 1, 1, 0, b"\0", chunk(b"tRNS", b"\0\0")), [WHITE, WHITE]),
    "2 bits": (lambda: png(2, 1, 2, 0, b"\x18"), [(0,) * 3, (85,) * 3]),
    "grey with alpha": (lambda: png(2, 1, 8, 4, bytes([0, 0, 9, 255])), [WHITE, (9,) * 3]),
    "a colour not shown": (
        lambda: png(2, 1, 8, 2, bytes([*BLUE, *ORANGE]), chunk(b"tRNS", struct.pack(">3H", *BLUE))),
        [WHITE, ORANGE],
    ),
    "16 bits": (lambda: png(2, 1, 16, 0, struct.pack(">2H", 25700, 65535)), [(100,) * 3, WHITE]),
    "16 bits, a value not shown": (
        lambda: png(2, 1, 16, 0, struct.pack(">2H", 25700, 257), chunk(b"tRNS", struct.pack(">H", 25700))),
        [WHITE, (1,) * 3],
    ),
    "16 bits with alpha": (lambda: png(2, 1, 16, 4, struct.pack(">4H", 0, 0, 25700, 65535)), [WHITE, (100,) * 3]),
    "16 bits, RGB": (lambda: png(2, 1, 16, 2, struct.pack(">6H", *(257 * v for v in BLUE + ORANGE))), [BLUE, ORANGE]),
    "16-bit TIFF": (lambda: tiff(16, 1, "<", struct.pack("<2H", 25700, 65535)), [(100,) * 3, WHITE]),
    "16-bit TIFF, high byte first": (lambda: tiff(16, 1, ">", struct.pack(">2H", 25700, 65535)), [(100,) * 3, WHITE]),
    "GIF film": (lambda: several("gif"), [ORANGE, ORANGE]),
    "WebP film": (lambda: several("webp", lossless=True), [ORANGE, ORANGE]),
    "PNG film": (lambda: several("png"), [ORANGE, ORANGE]),
    "TIFF of several pages": (lambda: several("tiff"), [ORANGE, ORANGE]),
    "MPO, two views": (lambda: several("mpo", quality=100), [ORANGE, ORANGE]),
    "colour profile": (lambda: encoded(orange(), icc_profile=b"a profile"), [ORANGE, ORANGE]),
    "EXIF that is none": (lambda: encoded(orange(), "jpeg", quality=100, exif=b"Exif\0\0garbage"), [ORANGE, ORANGE]),
}


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("cropped", [False, True])
def test_every_kind_of_picture_comes_out_right(kind, cropped):
    make, wanted = SHOWN[kind]
    with warnings.catch_warnings(action="ignore"):  # Pillow's about EXIF
        image = decode_picture(make(), "pic", 10**8, Crop(lambda width, height: None, (2, 1)) if cropped else None)
    assert image.mode == "RGB"
    pixels = np.asarray(image).reshape(-1, 3)[:2].astype(int)
    assert np.abs(pixels - wanted).max() <= 1  # what JPEG loses


REFUSED = {
    "floating-point": (lambda: tiff(32, 3, "<", struct.pack("<2f", 0.5, 1)), "floating-point pixels"),
    "32 bits": (lambda: tiff(32, 1, "<", struct.pack("<2I", 5, 4 * 10**9)), "32-bit pixels"),
    "below zero": (lambda: tiff(16, 2, "<", struct.pack("<2h", -5, 5)), "negative"),
    "16 bits as a negative": (lambda: tiff(16, 1, "<", struct.pack("<2H", 5, 9), white=0), "with 0 for white"),
    "no pixels": (lambda: png(0, 1, 8, 2, b""), "is not an image that Pillow can read"),
    "huge": (lambda: png(60_000, 60_000, 8, 2, b""), "has 60000 x 60000 pixels, more than dataset.max_pixels"),
    "a text bomb": (lambda: png(1, 1, 8, 2, bytes(3), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))), "too large"),
    "a profile bomb": (lambda: png(1, 1, 8, 2, bytes(3), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**7)))), "too large"),
    "icon": (lambda: encoded(orange(), "ico"), "is not an image that Pillow can read; formats are JPEG, PNG,"),
    "PostScript": (lambda: encoded(orange(), "eps"), "is not an image that Pillow can read"),
    "a web page": (lambda: b"<html><body>404</body></html>", "is not an image that Pillow can read"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("crop", [None, Crop(lambda width, height: None, (8, 8))])
def test_other_pictures_are_refused_by_name(kind, crop):
    make, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=rf"pic .*{sentence}"):
        decode_picture(make(), "pic", 10**8, crop)


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "webp", "tiff", "bmp", "ppm", "jpeg2000", "avif"])
@pytest.mark.parametrize("crop", [None, Crop(lambda width, height: None, (8, 8))])
def test_no_truncated_picture_passes(kind, crop):
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), kind)
    assert decode_picture(data, "pic", 10**8, crop).mode == "RGB"
    with pytest.raises(UserError, match=r"pic is (corrupt or truncated|not an image)"):
        decode_picture(data[: len(data) * 2 // 3], "pic", 10**8, crop)


def quarters(width, height):
    """Black, red, green and white: no two of the eight ways to turn it look alike."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for corner, colour in (((0, 0), "black"), ((width // 2, 0), "red"), ((0, height // 2), (0, 255, 0))):
        draw.rectangle((*corner, corner[0] + width // 2 - 1, corner[1] + height // 2 - 1), colour)
    return image


def turned(upright, orientation, kind, **options):
    """A file as a camera writes it that is held in one of eight ways."""
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}.get(orientation, pictures._UPRIGHT.get(orientation))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(upright if back is None else upright.transpose(back), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_exif_turns_the_picture_upright(orientation, kind):
    upright = quarters(12, 8)
    options = {"jpeg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    found = decode(turned(upright, orientation, kind, **options))
    assert found.size == (12, 8)
    assert np.abs(np.asarray(found, int) - np.asarray(upright, int)).max() <= (20 if kind == "jpeg" else 0)  # edges in JPEG


@pytest.fixture
def decoded(monkeypatch):
    """The sizes of the pictures that are resized."""
    sizes, resize = [], pictures.resize
    monkeypatch.setattr(pictures, "resize", lambda image, *rest: sizes.append(image.size) or resize(image, *rest))
    return sizes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs_it(orientation, decoded):
    upright = quarters(801, 401)
    data = turned(upright, orientation, "jpeg", quality=95)
    # crops of 256 x 128 at 64 x 32, 65 x 32 and 16 x 16; one whose sides ask for an eighth and a half; one that is enlarged
    left, top, right, bottom = box = (300, 150, 556, 278)
    for size, divisor in (((64, 32), 4), ((65, 32), 2), ((16, 16), 8), ((20, 60), 2), ((300, 200), 1)):
        found = decode_picture(data, "pic", 10**8, Crop(lambda width, height: box, size))
        assert decoded.pop() == (-(-801 // divisor), -(-401 // divisor)) and found.size == size
        exact = upright.resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        assert np.abs(np.asarray(found, int) - np.asarray(exact, int)).mean() < 2  # edges in JPEG


def test_no_crop_is_enlarged_that_was_large_enough(decoded):
    rng = random.Random(0)
    data = {size: encoded(quarters(*size), "jpeg") for size in ((640, 480), (333, 777), (50, 50))}
    for _ in range(200):
        (width, height), wanted = rng.choice(list(data)), rng.choice([10, 48, 100, 224])
        right, bottom = rng.randint(1, width), rng.randint(1, height)
        box = (rng.randrange(right), rng.randrange(bottom), right, bottom)
        decode_picture(data[width, height], "pic", 10**8, Crop(lambda *size, box=box: box, (wanted, wanted)))
        reduction = -(-width // decoded.pop()[0])
        sides = box[2] - box[0], box[3] - box[1]
        assert reduction == 1 or min(sides) / reduction >= wanted
        assert reduction == 8 or min(sides) / (2 * reduction) < wanted + 1  # nor larger than it has to be


def test_the_whole_is_never_reduced(photos, decoded):
    with Image.open(photos / "china.jpg") as image:
        assert np.array_equal(np.asarray(PathImage(photos / "china.jpg", 10**8).open()), np.asarray(image))
    PathImage(photos / "china.jpg", 10**8).open(Crop(lambda width, height: None, (16, 16)))
    assert decoded == [(80, 54)]
