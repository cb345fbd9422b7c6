from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.data.collate import ImageCollate
from blip2x.data.pictures import PathImage
from blip2x.data.samples import PictureSample
from blip2x.errors import UserError
from blip2x.tasks.common.loading import Share, eval_loader, eval_transform, report_skipped, train_loader, train_transform


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


def cfg_and_samples(pictures, count, bad=()):
    """A config that leaves bad images out, and samples of which those at the places `bad` share one that is bad."""
    (pictures / "bad.png").write_bytes(b"")
    names = ["bad.png" if place in bad else "a.png" for place in range(count)]
    samples = [PictureSample(PathImage(pictures / name, 10**6), place) for place, name in enumerate(names)]
    return compose_config(["task=caption", "task.eval_batch_size=2", "dataset.on_bad_image=skip"]), samples


@pytest.mark.parametrize(("count", "ranks", "tensor"), [(5, 1, 1), (5, 2, 1), (3, 4, 1), (2, 3, 1), (5, 4, 2)])
def test_each_sample_is_on_one_data_rank_whatever_the_sizes(over_ranks, pictures, count, ranks, tensor):
    cfg, samples = cfg_and_samples(pictures, count, bad=(1, 3))

    def work(run):
        share = Share.of_images(cfg, run, samples, "look")
        seen = [(places, batch["image_id_B"].tolist()) for places, batch in share]
        assert all(places == ids for places, ids in seen)
        return [place for places, _ in seen for place in places], share.found.tolist()

    found = over_ranks(ranks, work, tensor)
    readable = [place for place in range(count) if place not in (1, 3)]
    assert [places for _, places in found] == [readable] * ranks
    assert sorted(place for own, _ in found[::tensor] for place in own) == readable
    assert all(own == found[rank - rank % tensor][0] for rank, (own, _) in enumerate(found))


def test_a_sample_that_a_loader_forgets_or_repeats_is_found(run, pictures):
    cfg, samples = cfg_and_samples(pictures, 4)
    for shown in (samples[:3], [*samples, samples[0]]):
        share = Share.of_images(cfg, run, samples, "look")
        share._loader = eval_loader(cfg, run, shown, ImageCollate(eval_transform(cfg)))
        with pytest.raises(RuntimeError, match=f"{len(shown)} samples were evaluated by all ranks together, not 4"):
            list(share)


def test_an_evaluation_that_could_read_no_image_has_no_result(run, pictures):
    cfg, samples = cfg_and_samples(pictures, 1, bad=(0,))
    with pytest.raises(UserError, match="not one of the images to evaluate on can be read"):
        list(Share.of_images(cfg, run, samples, "look"))
    assert "bad.png is empty" in (run.folder / "skipped.txt").read_text()
    may = Share(cfg, run, samples, ImageCollate(eval_transform(cfg)), "look", may_be_empty=True)
    assert list(may) == [] and may.found.tolist() == []
