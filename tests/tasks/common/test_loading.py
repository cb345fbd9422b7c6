from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.data.collate import ImageCollate
from blip2x.data.pictures import PathImage
from blip2x.data.samples import PictureSample
from blip2x.errors import UserError
from blip2x.tasks.common.loading import (
    eval_loader,
    eval_transform,
    finish_evaluation,
    report_skipped,
    train_loader,
    train_transform,
)


def test_transforms_have_the_encoders_size_and_the_data_sets_numbers():
    cfg = compose_config(["task=caption", "model.vision.image_size=96", "dataset=coco"])
    image = Image.new("RGB", (10, 20), (255, 255, 255))
    array = eval_transform(cfg)(image)
    assert array.shape == (3, 96, 96)
    mean, std = np.array(cfg.dataset.transform.mean), np.array(cfg.dataset.transform.std)
    np.testing.assert_allclose(array[:, 0, 0], (1 - mean) / std, rtol=1e-5)
    assert train_transform(cfg).size == (96, 96)


def test_loaders_take_their_sizes_from_the_config(run, pictures):
    samples = [PictureSample(PathImage(pictures / "a.png", 10**6), number) for number in range(5)]
    sizes = ["task.batch_size=2", "task.eval_batch_size=3"]
    cfg = compose_config(["task=caption", *sizes])
    collate = ImageCollate(eval_transform(cfg))
    assert [batch["image_id_B"].tolist() for batch in eval_loader(cfg, run, samples, collate)] == [[0, 1, 2], [3, 4]]
    assert [len(batch["image_id_B"]) for batch in train_loader(cfg, run, samples, collate)] == [2, 2]


def test_what_was_skipped_is_named_once(run):
    report_skipped(run, [])
    assert not (run.folder / "skipped.txt").exists() and run.console.file.getvalue() == ""
    report_skipped(run, [f"image {number} is bad" for number in range(7)])
    report_skipped(run, ["image 3 is bad", "image [9] is bad"])
    lines = (run.folder / "skipped.txt").read_text().splitlines()
    assert lines == [*(f"image {number} is bad" for number in range(7)), "image [9] is bad"]
    said = run.console.file.getvalue()
    assert "warning: 7 left out" in said and "warning: 1 left out" in said
    assert "image 4 is bad" in said and "image 5 is bad" not in said and "image [9] is bad" in said


def test_an_evaluation_that_could_read_no_image_has_no_result(run, pictures):
    (pictures / "a.png").write_bytes(b"")
    cfg = compose_config(["task=caption", "dataset.on_bad_image=skip"])
    samples = [PictureSample(PathImage(pictures / "a.png", 10**6), 0)]
    loader = eval_loader(cfg, run, samples, ImageCollate(eval_transform(cfg)))
    assert list(loader) == []
    with pytest.raises(UserError, match="not one of the images to evaluate on can be read"):
        finish_evaluation(run, loader, 0)
    assert "a.png is empty" in (run.folder / "skipped.txt").read_text()
    finish_evaluation(run, loader, 1)
