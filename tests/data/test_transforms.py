import os
import random

import numpy as np
import pytest
from PIL import Image

from blip2x.config.dataset import TransformConfig
from blip2x.data import transforms
from blip2x.data.pictures import PathImage
from blip2x.data.shards import StoredImage
from blip2x.data.transforms import EvalTransform, Lot, TrainTransform, random_box


def config(crop_scale=None, flip=False):
    return TransformConfig(mean=[0.5, 0.25, 0.0], std=[0.5, 0.25, 2.0], crop_scale=crop_scale, flip=flip)


def gradient(width, height):
    """Red grows to the right, green downward."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def test_pixels_are_normalised_channel_by_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = EvalTransform(config(), 8)(Image.fromarray(pixels))
    expected = (pixels / 255 - [0.5, 0.25, 0.0]) / [0.5, 0.25, 2.0]
    assert out.shape == (3, 8, 8) and out.dtype == np.float32 and out.flags["C_CONTIGUOUS"]
    assert np.allclose(out, expected.transpose(2, 0, 1), atol=1e-5)


def test_evaluation_keeps_the_whole_picture():
    out = EvalTransform(config(), 16)(gradient(64, 32))
    assert out.shape == (3, 16, 16)
    assert out[0, :, 0].max() < -0.9 and out[0, :, -1].min() > 0.9  # left and right edge are there


def test_training_without_crop_and_flip_is_the_evaluation():
    image = gradient(40, 30)
    assert np.array_equal(TrainTransform(config(), 16)(image, random.Random(0)), EvalTransform(config(), 16)(image))


def test_crops_show_a_part_and_follow_from_the_seed():
    transform = TrainTransform(config(crop_scale=[0.1, 0.3]), 16)
    first, again, other = (transform(gradient(64, 64), random.Random(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.ptp(first[0]) < 1.5  # of 2


def test_half_of_the_pictures_are_mirrored():
    transform = TrainTransform(config(flip=True), 16)
    rng = random.Random(0)
    mirrored = sum(transform(gradient(16, 16), rng)[0, 0, 0] > 0 for _ in range(400))
    assert 160 < mirrored < 240


def test_boxes_have_the_area_and_ratio_asked_for():
    rng = random.Random(0)
    for _ in range(500):
        left, top, right, bottom = random_box(300, 200, [0.2, 0.9], rng)
        assert 0 <= left < right <= 300 and 0 <= top < bottom <= 200
        width, height = right - left, bottom - top
        assert 0.19 < width * height / 60_000 < 0.91 and 0.74 < width / height < 1.35


def test_very_long_pictures_get_a_central_box():
    assert random_box(1000, 9, [0.9, 1.0], random.Random(0)) == (494.0, 0.0, 506.0, 9.0)


def test_normalised_pixels_are_those_of_the_formula_in_float32():
    pixels = np.arange(768, dtype=np.uint8).reshape(16, 16, 3)
    mean, std = (np.array(values, dtype=np.float32) for values in ([0.5, 0.25, 0.0], [0.5, 0.25, 2.0]))
    expected = pixels.astype(np.float32) * (1 / (255 * std)) - mean / std
    assert np.array_equal(EvalTransform(config(), 16)(Image.fromarray(pixels)), expected.transpose(2, 0, 1))


@pytest.fixture
def files(tmp_path):
    """The same picture as PNG and as JPEG."""
    image = gradient(400, 300)
    for name in ("a.png", "a.jpg"):
        image.save(tmp_path / name, quality=95)
    return [PathImage(tmp_path / name, 10**8) for name in ("a.png", "a.jpg")]


def test_files_get_the_crops_and_mirrors_of_opened_pictures(files):
    transform = TrainTransform(config(crop_scale=[0.5, 1.0], flip=True), 32)
    for seed in range(20):
        randoms = [random.Random(seed) for _ in range(3)]
        opened = transform(files[0].open(), randoms[0])
        exact, reduced = (transform.load(file, rng) for file, rng in zip(files, randoms[1:], strict=True))
        assert np.array_equal(exact, opened) and np.abs(reduced - opened).max() < 0.1  # 2 is the range
        assert len({rng.random() for rng in randoms}) == 1


def test_evaluation_reads_files_at_their_full_size(files):
    transform = EvalTransform(config(), 16)
    for file in files:
        with Image.open(file.path) as image:
            assert np.array_equal(transform.load(file), transform(image))


def test_training_needs_a_source_of_chance():
    with pytest.raises(ValueError, match="needs rng"):
        TrainTransform(config(), 16)(gradient(8, 8))


def test_fixed_crops_come_again_and_leave_the_lot_as_it_was(files):
    """Only epoch and picture count, not the run's seed; and what is drawn after a crop is not drawn from its numbers."""
    transform = TrainTransform(config(crop_scale=[0.2, 0.6], flip=True), 16, crops=3)
    picture, other = files[:2]
    seeds = (1, 1, 1, 2, 2, 2)
    lots = [Lot.of(seed, epoch, epoch) for epoch, seed in enumerate(seeds)]
    made = [transform.load(picture, lot) for lot in lots]
    assert all(np.array_equal(made[epoch], made[epoch + 3]) for epoch in range(3))
    assert len({one.tobytes() for one in made}) == 3
    assert [lot.random() for lot in lots] == [random.Random(f"{seed}/{e}/{e}").random() for e, seed in enumerate(seeds)]
    assert not np.array_equal(transform.load(other, Lot.of(1, 0, 0)), made[0])
    variants = [transform.variant(picture, Lot.of(1, epoch, 0)) for epoch in range(6)]
    assert variants[:3] == variants[3:] and len({*variants, transform.variant(other, lots[0])}) == 4
    assert transform.variant(picture, Lot.of(1, 0, 7, copy=1)) == variants[1]  # what comes twice in an epoch has two crops


def test_where_nothing_is_drawn_no_crop_is_sought(files, monkeypatch):
    expected = TrainTransform(config(), 16).load(files[0], Lot.of(0, 0, 0))
    monkeypatch.setattr(transforms, "identity_of", None)
    assert np.array_equal(TrainTransform(config(), 16, crops=2).load(files[0], Lot.of(0, 0, 0)), expected)


def test_fixed_crops_are_the_same_wherever_a_folder_is_mounted_and_whatever_bytes_a_name_has(tmp_path):
    made = []
    for folder in ("here/images", "there/on/images", "here/pictures"):
        (tmp_path / folder).mkdir(parents=True)
        path = tmp_path / folder / os.fsdecode(b"caf\xe9.png")
        gradient(400, 300).save(path)
        transform = TrainTransform(config(crop_scale=[0.2, 0.6], flip=True), 16, crops=2)
        made.append(transform.load(PathImage(path, 10**8), Lot.of(0, 1, 5)))
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


def test_a_limit_on_size_is_part_of_what_a_picture_is(files):
    """Or what was kept of a picture would be given where it is to be refused."""
    stored = [StoredImage(files[0].path, 0, 5, "a", limit) for limit in (10**8, 10**4)]
    assert len({files[0].identity, PathImage(files[0].path, 10**4).identity, *(each.identity for each in stored)}) == 4


def test_crops_that_are_drawn_anew_have_no_name(files):
    with pytest.raises(ValueError, match="drawn anew"):
        TrainTransform(config(flip=True), 16).variant(files[0], Lot.of(0, 0, 0))
