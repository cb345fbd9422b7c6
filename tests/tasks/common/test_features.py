"""A frozen encoder's outputs, kept: training with them equals training without, and no picture is encoded twice."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from safetensors.numpy import load_file

from blip2x.config.compose import compose_config
from blip2x.config.run import PrecisionName, RunConfig
from blip2x.config.task import WeightsType
from blip2x.data.collate import ImageCollate
from blip2x.data.pictures import PathImage
from blip2x.data.samples import PictureSample
from blip2x.engine import fit
from blip2x.engine.run_files import TIMES
from blip2x.errors import UserError
from blip2x.models.precision import store_compact
from blip2x.models.vision.eva_vit import EvaVit
from blip2x.models.weights.checkpoint import fill
from blip2x.models.weights.stored import StoredTensor
from blip2x.parallel.context import Context
from blip2x.registry import TASKS
from blip2x.tasks.common import features as features_module
from blip2x.tasks.common import train as train_module
from blip2x.tasks.common.features import Features, count_images, crops_kept, predicted_bytes
from blip2x.tasks.common.loading import eval_transform, train_loader, train_transform

SHORT = ["task.num_beams=1", "task.max_new_tokens=4", "task.min_new_tokens=1", "task.blind_baseline=false"]  # texts
TRAIN, TEST = 64, 12  # images that `run_task` has: 8 batches an epoch


@pytest.fixture
def stage1(run_task, trained, small, tmp_path):
    """`stage1(*overrides)` -> run folder of a training of ten steps, the ninth of which begins the second epoch."""
    vision = f"model.vision.weights={trained}/pretrain_vision/checkpoint"

    def run(*overrides: str) -> Path:
        features_module._opened.clear()  # as in a process of its own
        words = ["task.max_steps=10", "task.contrast_steps=4", "model.qformer.dropout=0.1", "task.validation.captions=false"]
        return run_task("pretrain_stage1", *small, vision, f"paths.cache={tmp_path}/cache", *words, *overrides)[1]

    return run


@pytest.fixture
def rounded(monkeypatch):
    """Have image encoders round as the cache does."""
    forward = EvaVit.forward
    monkeypatch.setattr(EvaVit, "forward", lambda *given: forward(*given).astype("float16").astype("float32"))


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(folder / "checkpoint" / "model.safetensors").items()}


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def stored(tmp_path: Path, kind: str) -> list[Path]:
    return sorted((tmp_path / "cache" / "features").glob(f"*/*.{kind}"))


def test_encoders_that_differ_in_scales_alone_share_no_cache():
    """Rows of int8 are the same where all numbers of a matrix are multiplied alike."""

    def hashed(factor: float) -> str:
        with paddle.LazyGuard():
            layer = nn.LayerDict({"up": nn.Linear(3, 2, bias_attr=False)})
        store_compact(layer, WeightsType.int8, "float32")
        array = factor * np.arange(6, dtype=np.float32).reshape(3, 2)
        fill(layer, {"up.weight": StoredTensor("up.weight", array.shape, array.dtype, lambda: array)}, "x")
        return features_module._hash(layer)

    assert hashed(1.0) == hashed(1.0) != hashed(2.0)


@pytest.mark.parametrize("contrast", [[], ["task.cached_contrast=true", "task.accumulate=2", "task.max_steps=5"]])
def test_training_equals_one_without_a_cache_whose_features_are_rounded_alike(stage1, encoded, rounded, contrast):
    plain = stage1(*contrast)
    expected = lines(plain), weights(plain)
    assert sum(encoded) == 10 * 8 + TEST
    encoded.clear()
    filling = stage1("dataset.cache=features", *contrast)
    assert (lines(filling), weights(filling)) == expected
    assert encoded == [8] * 8 + [5, 5, 2]  # in the first epoch as it goes by, and for the validation
    assert f"{TRAIN} images x 1 crop x 10 x 24 in float16: 30.0 KiB" in said(filling)


def test_a_later_run_encodes_nothing_and_workers_read_and_fill_alike(stage1, encoded):
    by_workers = stage1("dataset.cache=features", "dataset.num_workers=2")
    expected = lines(by_workers), weights(by_workers)
    assert sum(encoded) == TRAIN + TEST
    encoded.clear()
    later = stage1("dataset.cache=features")
    assert (lines(later), weights(later)) == expected and encoded == []
    again = stage1("dataset.cache=features", "dataset.num_workers=2")
    assert (lines(again), weights(again)) == expected and encoded == []


def test_a_run_that_breaks_off_while_it_fills_ends_as_if_it_had_not(stage1, encoded, monkeypatch, tmp_path):
    words = ["dataset.cache=features", "task.save_every=2"]
    alone = stage1(*words)
    expected = lines(alone), weights(alone)
    add = fit.LossRecord.add

    def fail(record, step, parts):
        if step == 6:
            raise RuntimeError("killed")
        add(record, step, parts)

    monkeypatch.setattr(fit.LossRecord, "add", fail)
    words += [f"paths.cache={tmp_path}/another", "overwrite=false", "resume=auto", "run_name=broken"]
    with pytest.raises(RuntimeError, match="killed"):
        stage1(*words)
    monkeypatch.setattr(fit.LossRecord, "add", add)
    (index,) = (tmp_path / "another" / "features").glob("*/*.index")
    assert index.stat().st_size == 6 * 8 * 32
    os.truncate(index, 6 * 8 * 32 - 5)  # in the middle of a record
    encoded.clear()
    stage1(*words)
    found = tmp_path / "broken"
    assert (lines(found), weights(found)) == expected
    assert sum(encoded) == 1 + 2 * 8 + TEST


def test_damaged_rows_are_encoded_anew_and_told(stage1, encoded, tmp_path):
    filled = stage1("dataset.cache=features")
    expected = lines(filled)
    (rows,), (index,) = stored(tmp_path, "rows"), stored(tmp_path, "index")
    data = bytearray(rows.read_bytes())
    for row in (0, 20, TRAIN + 1):  # two pictures of the training, one of the validation
        data[row * 480 + 7] ^= 4
    rows.write_bytes(data)
    records = bytearray(index.read_bytes())
    records[40 * 32] ^= 1
    index.write_bytes(records)
    encoded.clear()
    again = stage1("dataset.cache=features")
    assert lines(again) == expected and sum(encoded) == 4
    assert "1 rows in" in said(again) and "4 pictures encoded, 3 of them anew since their rows were damaged" in said(again)


def test_fixed_crops_are_encoded_once_each_and_come_again(stage1, encoded, rounded):
    words = ["dataset.transform.crop_scale=[0.3,0.9]", "dataset.transform.flip=true", "dataset.train_scenes=16"]
    words += ["dataset.crops=3", "task.max_steps=12"]  # two steps an epoch: each crop twice
    plain = stage1(*words)
    expected = lines(plain)
    assert sum(encoded) == 12 * 8 + TEST
    encoded.clear()
    cached = stage1("dataset.cache=features", *words)
    assert lines(cached) == expected and sum(encoded) == 3 * 16 + TEST
    assert "16 images x 3 crops" in said(cached)


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=pretrain_stage1", "dataset.transform.flip=true"],
        ["task=caption", "task.train=true", "dataset.transform.crop_scale=[0.5,1]"],
    ],
)
def test_crops_that_never_come_again_are_refused(overrides):
    with pytest.raises(UserError, match=r"dataset.crops=null draws new ones each epoch; set dataset.crops=1"):
        compose_config([*overrides, "dataset.cache=features"])
    compose_config([*overrides, "dataset.cache=features", "dataset.crops=2"])
    compose_config(["task=caption", "dataset.transform.flip=true", "dataset.cache=features"])  # which trains nothing


def test_an_encoder_that_is_trained_or_shared_is_refused():
    with pytest.raises(UserError, match=r"model\.vision\.frozen=false trains it"):
        compose_config(["task=pretrain_stage2", "model.vision.frozen=false", "dataset.cache=features"])
    tuned = ["experiment=retrieval_coco_ft_vitg", "task.train=false", "model.weights=x"]  # an evaluation trains nothing
    compose_config([*tuned, "dataset.cache=features"])
    with pytest.raises(UserError, match=r"parallelism.tp=2 lets several work on the same"):
        compose_config(["task=pretrain_stage2", "parallelism=tp2", "dataset.cache=features"])
    for task in ("pretrain_vision", "pipeline"):  # what has no frozen encoder goes without
        compose_config([f"task={task}", "dataset.cache=features"])


def test_what_would_be_too_large_is_refused_before_anything_is_written(stage1, opened, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"64 images x 1 crop x 10 x 24 in float16: 30.0 KiB; that is more than dataset.cache_gb=1e-05"
    ):
        stage1("dataset.cache=features", "dataset.cache_gb=1e-5")
    full_disk(monkeypatch)
    with pytest.raises(UserError, match=r"30.0 KiB, of which 30.0 KiB lack; the disk of paths.cache has 1.0 KiB free"):
        expect(opened(), [PictureSample(None, number) for number in range(64)])
    assert not stored(tmp_path, "rows")


def full_disk(monkeypatch) -> None:
    disk = namedtuple("usage", "total used free")(2**30, 2**30, 1000)
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda _: disk)


def expect(features: Features, samples: list[PictureSample], begins: bool = True, **words) -> None:
    features.expect(samples, ImageCollate(eval_transform(features.cfg)), 1, "train", begins=begins, **words)


def test_a_training_that_cannot_fit_is_refused_before_its_weights_are_there(small, tmp_path, monkeypatch):
    words = ["task=pretrain_stage1", *small, "dataset.cache=features", "dataset.cache_gb=1e-5", f"paths.cache={tmp_path}/cache"]
    cfg = compose_config([*words, "dataset.train_scenes=64", "dataset.test_scenes=12", "task.batch_size=8"])
    check = functools.partial(TASKS.get("pretrain_stage1").check, cfg, frozenset({"model.vision.weights"}))
    with pytest.raises(UserError, match=r"features \(train\): 64 images .* that is more than dataset.cache_gb=1e-05"):
        check()
    cfg.task.max_steps, cfg.task.max_epochs = 2, None
    check()  # two batches fit
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    with pytest.raises(UserError, match="32 of 64 images"):
        check()
    (tmp_path / "cache/features/key").mkdir(parents=True)
    (tmp_path / "cache/features/key/a.index").write_bytes(b"")
    check()  # something has been kept, perhaps all that is wanted


def test_a_training_leaves_its_checkpoints_their_room(stage1, monkeypatch, tmp_path):
    monkeypatch.setattr(train_module, "_left_to", lambda *_: lambda: 2**60)
    with pytest.raises(UserError, match=r"lack; the disk of paths.cache has .* free, of which 1073741824.00 GiB are left to"):
        stage1("dataset.cache=features")
    assert not stored(tmp_path, "rows")


def test_a_short_training_keeps_no_more_than_it_reads(stage1, encoded):
    folder = stage1("dataset.cache=features", "dataset.cache_gb=2e-5", "task.max_steps=3")  # 64 images take 31 kB
    assert f"24 of {TRAIN} images x 1 crop x 10 x 24 in float16: 11.2 KiB" in said(folder)
    assert encoded == [8, 8, 8, 5, 5, 2] and "warning: features" not in said(folder)
    encoded.clear()
    stage1("dataset.cache=features", "dataset.cache_gb=2e-5", "task.max_steps=3")
    assert encoded == []  # the validation's were kept, too: the training needed no more room


def test_a_limit_that_will_be_reached_is_told_at_the_start(opened, pictures):
    kept, others = ([PictureSample(PathImage(pictures / name, 10**6), 0)] for name in ("a.png", "b.jpg"))
    batches(opened(), kept)
    features = opened(lambda cfg: setattr(cfg.dataset, "cache_gb", 6e-7))  # one row of 480 bytes
    expect(features, others)
    text = features._run.console.file.getvalue()
    assert "with the 0.5 KiB that are there, that is more than dataset.cache_gb=6e-07; what finds no room" in text


def test_a_validation_takes_no_room_that_the_training_needs(stage1, encoded):
    """It comes first: after the fourth of eight steps that fill the cache."""
    words = ["dataset.cache=features", "dataset.cache_gb=3.2e-5", "task.eval_every=4", "task.max_steps=16"]
    folder = stage1(*words)  # two rows fit beside the training's
    assert encoded.count(8) == 8 and encoded[4:7] == [5, 5, 2]
    assert said(folder).count("and the 15.0 KiB that the training has yet to keep, that is more than") == 1
    encoded.clear()
    stage1(*words)
    assert encoded == [5, 5] * 4


def test_what_is_there_is_not_refused_and_what_other_pictures_have_does_not_count(opened, pictures, monkeypatch):
    kept, others = ([PictureSample(PathImage(pictures / name, 10**6), 0)] * 3 for name in ("a.png", "b.jpg"))
    batches(opened(), kept)
    full_disk(monkeypatch)
    again = opened(lambda cfg: setattr(cfg.dataset, "cache_gb", 1e-9))
    expect(again, kept)
    assert "of which 0 lack" in again._run.console.file.getvalue()
    with pytest.raises(UserError, match=r"more than dataset.cache_gb=1e-09"):
        expect(again, [*kept, *others])
    monkeypatch.undo()
    expect(opened(), [*kept, *others])
    assert "of which about 0.2 KiB lack" in again._run.console.file.getvalue()


def test_an_evaluation_that_does_not_fit_is_warned_of_and_done(opened, pictures, tmp_path):
    """It may stand at the end of a training of days."""
    features, sample = (
        opened(lambda cfg: setattr(cfg.dataset, "cache_gb", 1e-9)),
        PictureSample(PathImage(pictures / "a.png", 10**6), 0),
    )
    expect(features, [sample], begins=False)
    assert "warning: features: train: that is more than dataset.cache_gb=1e-09" in features._run.console.file.getvalue()
    assert len(batches(features, [sample])) == 1 and not stored(tmp_path, "rows")


def test_the_main_rank_speaks_for_all(opened, pictures, monkeypatch):
    features = opened()
    batches(features, [PictureSample(PathImage(pictures / "a.png", 10**6), 0)])
    monkeypatch.setattr(Context, "gather_objects", lambda self, value: [value, (5, 2, "its disk is full")])
    features.report()
    text = features._run.console.file.getvalue()
    assert "features: 6 pictures encoded, 2 of them anew" in text and "no more is kept" in text and "its disk is full" in text
    monkeypatch.setattr(Context, "gather_objects", lambda self, value: [value, (0, 0, "its disk is full")])
    features.report()
    assert features._run.console.file.getvalue() == text


def test_no_more_crops_are_kept_than_a_training_has_epochs(small):
    cfg = copy.deepcopy(composed(*small, "dataset.transform.flip=true", "dataset.crops=4"))
    cfg.task.max_steps, cfg.task.max_epochs, cfg.task.accumulate = 10, None, 2
    assert [crops_kept(cfg, batches) for batches in (None, 20, 19, 5, 2)] == [4, 1, 2, 4, 4]
    cfg.task.max_steps, cfg.task.max_epochs = None, 3
    assert crops_kept(cfg, 100) == 3
    cfg.dataset.transform.flip = False
    assert crops_kept(cfg) == 1


def test_what_goes_beyond_the_limit_is_encoded_each_time(stage1, encoded, tmp_path):
    """The training's images fit, and the first five of the validation beside them."""
    words = ["dataset.cache=features", "dataset.cache_gb=3.5e-5"]
    folder = stage1(*words)
    assert sum(encoded) == TRAIN + TEST and said(folder).count("no more is kept") == 1
    encoded.clear()
    stage1(*words)
    assert encoded == [5, 2]


@pytest.mark.parametrize(
    ("task", "stage", "overrides"),
    [
        ("vqa_zeroshot", "pretrain_stage2", SHORT),
        ("caption", "pretrain_stage2", [*SHORT, "task.metrics=[CIDEr]"]),
        ("retrieval", "pretrain_stage1", ["task.k_test=3"]),
    ],
)
def test_evaluations_keep_features_too(run_task, trained, small, encoded, tmp_path, task, stage, overrides):
    words = [f"model.weights={trained}/{stage}/checkpoint", f"paths.cache={tmp_path}/cache", "dataset.cache=features"]
    words += [*small, *overrides]
    filling, _ = run_task(task, *words)
    assert sum(encoded) == TEST
    encoded.clear()
    features_module._opened.clear()
    later, _ = run_task(task, *words)
    assert later == filling and encoded == []


def test_a_picture_with_several_questions_is_encoded_once(run_task, trained, small, encoded, tmp_path):
    questions = ["dataset.questions_per_image=4", "dataset.train_scenes=16", "task.train=true", "task.batch_size=8"]
    run_task(
        "vqa_finetune", *small, *questions, "task.max_steps=8", "task.max_epochs=null", "dataset.num_workers=1",
        f"model.weights={trained}/pretrain_stage2/checkpoint", f"model.qformer.weights={trained}/pretrain_stage1/checkpoint",
        f"paths.cache={tmp_path}/cache", "dataset.cache=features", "task.validation.max_images=2",
    )  # fmt: skip
    assert sum(encoded) == 16 + TEST


class Encoder(nn.Layer):
    """Gives each picture's mean."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = self.create_parameter([1], default_initializer=nn.initializer.Constant(weight))
        self.seen: list[int] = []

    def forward(self, image_BCHW):
        self.seen.append(len(image_BCHW))
        mean_B = image_BCHW.mean(axis=[1, 2, 3]) * self.weight
        return mean_B.reshape([-1, 1, 1]).expand([len(image_BCHW), 10, 24])


@functools.cache
def composed(*words: str) -> RunConfig:
    """Composing takes longer than most of these tests."""
    return compose_config(["task=pretrain_stage1", *words])


@pytest.fixture
def opened(run, small, tmp_path):
    """`opened(change, weight=1)` -> the features of an encoder of that weight; `change` is called with the config."""

    def make(change: Callable[[RunConfig], None] = lambda _: None, weight: float = 1.0) -> Features:
        cfg = copy.deepcopy(composed(*small))
        cfg.paths.cache = str(tmp_path / "cache")
        change(cfg)
        made = Features(cfg, run, Encoder(weight))
        made.cfg = cfg
        return made

    return make


def batches(features: Features, samples: list[PictureSample], transform=eval_transform) -> list[dict]:
    cfg = features.cfg
    cfg.task.batch_size = len(samples)
    loader = train_loader(cfg, features._run, samples, ImageCollate(transform(cfg)), features)
    return [{name: np.asarray(value) for name, value in batch.items()} for batch in loader]


def test_a_picture_that_comes_twice_in_a_batch_is_encoded_once_and_stands_in_both_places(opened, pictures):
    features = opened()
    samples = [PictureSample(PathImage(pictures / name, 10**6), number) for number, name in enumerate(["a.png", "b.jpg"] * 2)]
    for seen in ([2], [2]):
        (batch,) = batches(features, samples)
        value = dict(zip(batch["image_id_B"].tolist(), batch["encoded_BPD"][:, 0, 0].tolist(), strict=True))
        assert batch["encoded_BPD"].dtype == np.float32 and batch["encoded_BPD"].shape == (4, 10, 24)
        assert value[0] == value[2] != value[1] == value[3] and features._encoder.seen == seen
    assert "image_BCHW" not in batch and "stored_F" not in batch


def test_a_file_that_has_changed_is_another_picture(opened, pictures):
    features, sample = opened(), PictureSample(PathImage(pictures / "a.png", 10**6), 0)
    (before,) = batches(features, [sample])
    (pictures / "a.png").write_bytes((pictures / "b.jpg").read_bytes())
    (after,) = batches(features, [sample])
    assert features._encoder.seen == [1, 1] and not np.array_equal(before["encoded_BPD"], after["encoded_BPD"])
    os.utime(pictures / "a.png", ns=(0, 1))
    batches(features, [sample])
    assert features._encoder.seen == [1, 1, 1]


def test_training_reads_a_file_otherwise_than_evaluation_so_both_are_kept(opened, pictures):
    features, sample = opened(), PictureSample(PathImage(pictures / "b.jpg", 10**6), 0)
    whole, small = (batches(features, [sample], transform)[0] for transform in (eval_transform, train_transform))
    assert features._encoder.seen == [1, 1] and not np.array_equal(whole["encoded_BPD"], small["encoded_BPD"])


def test_the_key_follows_from_all_that_changes_the_numbers(opened):
    folder = opened().folder
    assert opened(lambda cfg: (setattr(cfg, "seed", 7), setattr(cfg.model.vision, "drop_path_rate", 0.1))).folder == folder
    others = [
        opened(weight=2.0),
        opened(lambda cfg: setattr(cfg.dataset.transform, "mean", [0.4, 0.5, 0.5])),
        opened(lambda cfg: setattr(cfg.dataset.transform, "std", [0.4, 0.5, 0.5])),
        opened(lambda cfg: setattr(cfg.model.vision, "num_heads", 1)),
        opened(lambda cfg: setattr(cfg.precision, "name", PrecisionName.bf16)),
    ]
    assert len({folder, *(other.folder for other in others)}) == 6


def test_numbers_that_float16_cannot_hold_are_no_features(opened, pictures, tmp_path):
    with pytest.raises(UserError, match="float16 cannot hold"):
        batches(opened(weight=1e9), [PictureSample(PathImage(pictures / "a.png", 10**6), 0)])
    assert not stored(tmp_path, "index")


def test_a_cache_that_cannot_be_written_stops_nothing(opened, pictures, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    features, sample = opened(), PictureSample(PathImage(pictures / "a.png", 10**6), 0)
    assert len(batches(features, [sample])) == len(batches(features, [sample])) == 1
    assert features._encoder.seen == [1, 1]
    assert features._run.console.file.getvalue().count("no more is kept") == 1


def test_images_are_counted_once_however_many_samples_they_have():
    assert count_images([PictureSample(None, number) for number in (1, 2, 1, 3)]) == 3
    assert predicted_bytes(118_287, (257, 1408)) == pytest.approx(85.6e9, rel=1e-3)  # COCO's train2017
