"""`dataset=custom` on photographs that scikit-learn ships: every stage on good ones, one clear sentence about bad ones."""

from __future__ import annotations

import json
import math
import shutil
from collections import namedtuple
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.weights.manifest import frozen_origins, read_manifest
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.launch import launch

SHIPPED = Path(find_spec("sklearn").origin).parent / "datasets" / "images"
STEPS = "'task.batch_size=4','task.max_steps=3','task.max_epochs=null','task.log_every=1'"
TRAINED = {
    "pretrain_language": STEPS,
    "pretrain_stage1": f"{STEPS},'model.vision.frozen=false','dataset.num_workers=1'",
    "pretrain_stage2": STEPS,
    "caption": f"{STEPS},'task.train=true','task.metrics=[CIDEr]'",
    "vqa_zeroshot": "",
}


def photographs(folder: Path) -> list[str]:
    """Regions of the two photographs as files of several kinds and sizes."""
    names = []
    for source, modes in {"china": ["RGB", "L", "RGB", "RGBA", "RGB"], "flower": ["RGB", "RGB", "P", "RGB", "L"]}.items():
        with Image.open(SHIPPED / f"{source}.jpg") as picture:
            for number, mode in enumerate(modes):
                left, top = 90 * number, 40 * number
                name = f"{source}/{number:03d}.{'jpg' if mode == 'RGB' else 'png'}"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                picture.crop((left, top, left + 200 + 10 * number, top + 180)).convert(mode).save(folder / name)
                names.append(name)
    return names


def write_captions(path: Path, names: list[str]) -> list[dict]:
    """COCO-Karpathy style: an entry per caption, or one with all of them."""
    rows = []
    for number, name in enumerate(names):
        what = "a temple with a red roof" if name.startswith("china") else "a purple flower"
        texts = [f"{what}, seen from place {number}.", f"Photo of {what}"]
        given = [texts] if number % 2 else texts
        rows += [{"image": name, "caption": caption, "image_id": f"coco_{number + 10}"} for caption in given]
    path.write_text(json.dumps(rows))
    return rows


@pytest.fixture
def data(tmp_path):
    """The overrides that choose a data set of ten photographs in `tmp_path`."""
    return make_data(tmp_path)


def make_data(folder: Path) -> list[str]:
    names = photographs(folder / "images")
    write_captions(folder / "train.json", names[:4] + names[5:9])
    write_captions(folder / "eval.json", [names[4], names[9]])
    questions = [
        {"image": names[4], "question": "What is it?", "answer": ["temple"] * 7 + ["house"] * 3, "question_id": 5},
        {"image": names[9], "question": "What colour is it?", "answer": "purple", "question_id": 3},
        {"image": names[9], "question": "What is it?", "answer": "flower", "question_id": 4},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return [
        "dataset=custom",
        "dataset.num_workers=0",
        f"dataset.images={folder}/images",
        f"dataset.train_captions={folder}/train.json",
        f"dataset.eval_captions={folder}/eval.json",
        f"dataset.eval_questions={folder}/questions.jsonl",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, results, overrides of the data) of a run of every stage."""
    folder = tmp_path_factory.mktemp("photographs")
    data = make_data(folder)
    stages = ",".join(f"{{task: {task}, overrides: [{own}]}}" for task, own in TRAINED.items())
    command = [*data, "optim.warmup_steps=0", f"task.stages=[{stages}]", f"paths.outputs={folder}", "run_name=run"]
    return folder / "run", launch(compose_config(command), ["x"]), data


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_stage_runs_on_photographs(trained):
    folder, results, _ = trained
    assert [name for name in results if isinstance(results[name], dict)] == list(TRAINED)
    assert all(math.isfinite(value) for stage in TRAINED for value in results[stage].values())
    lines = rows(folder / "metrics.jsonl")
    for stage in TRAINED:
        steps = [line["step"] for line in lines if line["stage"] == stage and "loss" in line]
        assert steps == ([1, 2, 3] if stage != "vqa_zeroshot" else [])
    captions = {row["image_id"]: row for row in rows(folder / "caption/predictions.jsonl")}
    assert captions.keys() == {10, 11}
    assert captions[10]["references"] == ["a temple with a red roof, seen from place 0.", "Photo of a temple with a red roof"]
    answers = {row["question_id"]: row for row in rows(folder / "vqa_zeroshot/predictions.jsonl")}
    assert answers.keys() == {3, 4, 5} and answers[5]["answers"] == ["temple"] * 7 + ["house"] * 3
    assert (folder / "report.html").is_file() and not list(folder.glob("*/skipped.txt"))


def test_an_image_encoder_that_stage_1_trained_goes_on_frozen(trained):
    folder, _, _ = trained
    assert any(name.startswith("vision.") for name in read_manifest(folder / "pretrain_stage1/checkpoint")["tensors"])
    for stage in ("pretrain_stage2", "caption"):
        assert not any(name.startswith("vision.") for name in read_manifest(folder / stage / "checkpoint")["tensors"])
        assert frozen_origins(folder / stage / "checkpoint")["vision"] == str(folder / "pretrain_stage1/checkpoint")


@pytest.fixture
def start(data, tmp_path):
    """`start(*overrides)` starts stage 1 on the photographs; `tmp_path / "outputs/r"` is its folder."""

    def call(*overrides):
        steps = ["task.batch_size=4", "task.max_steps=2", "task.max_epochs=null", "task.eval_batch_size=4"]
        command = ["task=pretrain_stage1", "model.vision.frozen=false", *data, *steps]
        return launch(compose_config([*command, f"paths.outputs={tmp_path}/outputs", "run_name=r", *overrides]), ["x"])

    return call


def entries(tmp_path, change):
    path = tmp_path / "train.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


MISTAKES = {
    "empty caption": (lambda rows: rows[2].update(caption=" "), r"train\.json, entry 2: 'caption' is empty"),
    "no caption": (
        lambda rows: rows[2].pop("caption"),
        r"train\.json, entry 2 has no caption, though others have; add one or remove the entry",
    ),
    "no image": (lambda rows: rows[0].pop("image"), r"train\.json, entry 0 has no 'image'"),
    "missing file": (
        lambda rows: rows[0].update(image="a/b.jpg"),
        r"1 of 9 images of .*train\.json are missing in .*: a/b\.jpg",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_annotations_are_told_before_anything_is_made(start, tmp_path, mistake):
    change, sentence = MISTAKES[mistake]
    entries(tmp_path, change)
    with pytest.raises(UserError, match=sentence):
        start()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("key", ["model.weights", "model.vision.weights", "model.qformer.weights"])
def test_unknown_weights_are_told_before_anything_is_made(start, tmp_path, key):
    sentence = (
        f"^{key}=eva_clip_x: there is no eva_clip_x and no .*/eva_clip_x, and nothing .* has that name; .* mean eva_clip_g"
    )
    with pytest.raises(UserError, match=sentence):
        start(f"{key}=eva_clip_x")
    assert not (tmp_path / "outputs").exists()


def test_a_folder_that_exists_is_kept(start, tmp_path):
    (tmp_path / "outputs/r").mkdir(parents=True)
    with pytest.raises(UserError, match=r"r exists already; choose another run_name, .*or replace it with overwrite=true"):
        start()
    assert not list((tmp_path / "outputs/r").iterdir())


def test_a_full_disk_is_told_before_anything_is_made(start, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2**20))
    with pytest.raises(UserError, match=r"outputs: 1 MiB free on its disk, 200 MiB are needed; .*paths\.outputs"):
        start()
    assert not (tmp_path / "outputs").exists()


def test_a_disk_too_small_for_the_checkpoint_is_told_before_the_first_step(start, tmp_path, monkeypatch):
    monkeypatch.setattr("blip2x.engine.run.require_space", lambda folder: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(2**20))
    with pytest.raises(UserError, match=r"checkpoint: 1 MiB free on its disk, [12][0-9] MiB are needed"):
        start()
    assert not (tmp_path / "outputs/r/metrics.jsonl").exists()


def spoil(tmp_path, how: str, name: str) -> Path:
    path = tmp_path / "images" / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"this is no picture")
    return path


@pytest.mark.parametrize(("how", "sentence"), [("truncated", "is corrupt or truncated"), ("corrupt", "is not an image that")])
def test_a_bad_image_stops_with_its_name(start, tmp_path, how, sentence):
    path = spoil(tmp_path, how, "china/000.jpg")
    with pytest.raises(UserError, match=rf"{path} {sentence}.* \(dataset\.on_bad_image=skip leaves such images out\)"):
        start()
    assert not (tmp_path / "outputs/r/results.json").exists()


def test_bad_images_are_left_out_counted_and_named_where_the_config_says_so(start, tmp_path, capsys):
    bad = [spoil(tmp_path, how, name) for how, name in
           (("missing", "china/000.jpg"), ("truncated", "flower/001.jpg"), ("corrupt", "china/002.jpg"))]  # fmt: skip
    bad.append(spoil(tmp_path, "truncated", "china/004.jpg"))  # to evaluate on
    results = start("dataset.on_bad_image=skip", "task.max_steps=3")
    named = (tmp_path / "outputs/r/skipped.txt").read_text().splitlines()
    assert len(named) == len(bad) and all(any(str(path) in line for line in named) for path in bad)
    assert results["pretrain_stage1"]["chance"] == 1  # one of two images is left
    said = capsys.readouterr().out
    assert "warning: 1 left out" in said and str(bad[0]) in said.replace("\n", "")


def test_images_that_are_left_out_are_neither_captioned_nor_asked_about(trained, tmp_path):
    folder, _, data = trained
    shutil.copytree(folder.parent / "images", tmp_path / "images")
    bad = spoil(tmp_path, "truncated", "flower/004.png")
    stages = "task.stages=[{task: caption, overrides: ['task.metrics=[CIDEr]']},{task: vqa_zeroshot}]"
    more = [
        f"dataset.images={tmp_path}/images",
        "dataset.on_bad_image=skip",
        f"model.weights={folder}/pretrain_stage2/checkpoint",
    ]
    command = [*data, *more, stages, f"paths.outputs={tmp_path}", "run_name=r"]
    launch(compose_config(command), ["x"])
    assert [row["image_id"] for row in rows(tmp_path / "r/caption/predictions.jsonl")] == [10]
    assert [row["question_id"] for row in rows(tmp_path / "r/vqa_zeroshot/predictions.jsonl")] == [5]
    for stage in ("caption", "vqa_zeroshot"):
        assert str(bad) in (tmp_path / "r" / stage / "skipped.txt").read_text()


def test_images_missing_elsewhere_do_not_keep_a_file_from_the_evaluation_server(trained, tmp_path):
    folder, _, data = trained
    shutil.copytree(folder.parent / "images", tmp_path / "images")
    spoil(tmp_path, "missing", "china/000.jpg")  # to train on
    stages = "task.stages=[{task: caption, overrides: ['task.metrics=[CIDEr]']},{task: vqa_zeroshot}]"
    more = [
        f"dataset.images={tmp_path}/images",
        "dataset.on_bad_image=skip",
        f"model.weights={folder}/pretrain_stage2/checkpoint",
    ]
    cfg = compose_config([*data, *more, stages, f"paths.outputs={tmp_path}", "run_name=r"])
    source = build_source(cfg)
    assert source.captions("train").left_out == 1 and source.skipped  # as a training before it reads them
    launch(cfg, [*data, *more, stages])
    assert all((tmp_path / "r" / stage / "leaderboard.json").is_file() for stage in ("caption", "vqa_zeroshot"))


def test_nothing_left_to_evaluate_on_is_told(start, tmp_path):
    for name in ("china/004.jpg", "flower/004.png"):
        spoil(tmp_path, "corrupt", name)
    with pytest.raises(UserError, match="not one of the images to evaluate on can be read"):
        start("dataset.on_bad_image=skip")
    assert (tmp_path / "outputs/r/checkpoint/manifest.json").is_file()  # what was trained is kept
