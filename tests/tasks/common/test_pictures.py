"""Small copies: of the right size and kind, few of many, whole behind worker processes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from blip2x.config.dataset import OnBadImage, TransformConfig
from blip2x.data.loader import build_loader
from blip2x.data.pictures import PathImage
from blip2x.data.samples import CaptionSample, PictureSample
from blip2x.data.transforms import EvalTransform
from blip2x.tasks.common import pictures as module
from blip2x.tasks.common.pictures import ThumbnailCollate, one_in, save_pictures, thumbnail, thumbnails


def test_small_pictures_stay_as_they_are_and_large_ones_become_jpeg():
    small, large = Image.effect_noise((320, 9), 90).convert("RGB"), Image.new("RGB", (321, 100), "red")
    with Image.open(io.BytesIO(thumbnail(small))) as copy:
        assert copy.format == "PNG"
        np.testing.assert_array_equal(np.asarray(copy), np.asarray(small))
    with Image.open(io.BytesIO(thumbnail(large))) as copy:
        assert copy.format == "JPEG" and copy.size == (320, 100)
    assert large.size == (321, 100)


def test_no_more_than_a_run_keeps():
    for count in (0, 1, 600, 601, 1200, 10**6):
        every = one_in(count)
        assert len(range(0, count, every)) <= module.MOST_PICTURES and (every == 1 or count > module.MOST_PICTURES)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("every", [1, 2, 9])
def test_copies_come_with_the_batches(pictures, workers, every):
    names = ["a.png", "b.jpg", "more/c.png"]
    samples = [PictureSample(PathImage(pictures / name, 10**6), number + 1) for number, name in enumerate(names)]
    transform = EvalTransform(TransformConfig(mean=[0.5] * 3, std=[0.5] * 3, crop_scale=None, flip=False), 16)
    loader = build_loader(
        samples, ThumbnailCollate(transform, every), batch_size=2, shuffle=False, seed=0, num_workers=workers,
        on_bad_image=OnBadImage.stop,
    )  # fmt: skip
    found, shapes = {}, []
    for batch in loader:
        found |= thumbnails(batch)
        shapes.append(batch["image_BCHW"].shape)
    assert shapes == [(2, 3, 16, 16), (1, 3, 16, 16)]
    assert found == {s.image_id: thumbnail(s.image.open()) for s in samples if s.image_id % every == 0}


def test_a_data_sets_pictures_are_kept_but_for_bad_ones(run, pictures, monkeypatch):
    monkeypatch.setattr(module, "MOST_PICTURES", 2)
    (pictures / "more/c.png").write_bytes(b"")
    samples = [
        CaptionSample(PathImage(pictures / name, 10**6), ("a",), number)
        for name, number in (("b.jpg", 7), ("b.jpg", 7), ("a.png", 8), ("more/c.png", 9))
    ]
    assert save_pictures(run, samples) == {7: "images/7.jpg"}
    assert (run.folder / "images/7.jpg").is_file() and not (run.folder / "images/9.png").exists()


def test_pictures_that_a_report_shows_are_kept_before_all_others(run, pictures, monkeypatch):
    monkeypatch.setattr(module, "MOST_PICTURES", 5)
    samples = [CaptionSample(PathImage(pictures / "a.png", 10**6), ("a",), number) for number in range(20)]
    assert list(save_pictures(run, samples, [19, 3, 19])) == [19, 3, 0, 7, 13]
    assert list(save_pictures(run, samples, range(6))) == list(range(6))
    assert list(save_pictures(run, samples[:3], [2])) == [2, 0, 1]
