"""Features in files: the model's own, the same on any number of ranks, and the same when the run was stopped on its way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import paddle
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from blip2x.config.compose import compose_config
from blip2x.config.dataset import OnBadImage
from blip2x.config.task import FloatType
from blip2x.config.tools import FeatureFormat, FeatureMode
from blip2x.data.tokenize import clean_caption
from blip2x.errors import UserError
from blip2x.models.qformer.qformer import QFormer
from blip2x.models.weights.describe import follow_source
from blip2x.tasks.common.feature_files import FeatureFiles
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.launch import launch
from blip2x.tasks.common.loading import eval_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.extract_features import ExtractFeatures

SCENES, SHARD = 5, 2
QUERIES, WIDTH, SHARED = 8, 24, 64


@pytest.fixture(scope="module")
def words(small, trained):
    """A command on five scenes, two to a shard."""
    data = ["dataset.train_scenes=1", f"dataset.test_scenes={SCENES}", f"task.shard_size={SHARD}", "task.eval_batch_size=2"]
    return ["task=extract_features", *small, f"model.weights={trained}/pretrain_stage1/checkpoint", *data, "parallelism=dp"]


@pytest.fixture(scope="module")
def config(words):
    """`config(mode=..., dataset={...})` -> the command's config with other values of the task and the data set."""
    composed = compose_config(words)

    def make(dataset=None, **task):
        dataset = replace(composed.dataset, **(dataset or {}))
        return replace(composed, task=replace(composed.task, **task), dataset=dataset)

    return make


@pytest.fixture
def expected(config, run):
    """`expected(mode)` -> (arrays as the model's own functions give them, one image or text at a time, rows of the index)."""

    @paddle.no_grad()
    def make(mode, **task):
        cfg = config(mode=mode, **task)
        cfg.model = follow_source(cfg.model, None)
        model, tokenizer = ModelLoader.of_run(cfg, run).stage1()
        arrays, rows = {}, []

        def add(sample, text=None, **features):
            rows.append({"image_id": sample.image_id, "name": sample.image.name, **({} if text is None else {"text": text})})
            for name, tensor in features.items():
                arrays.setdefault(name, []).append(tensor.numpy()[0])

        for sample in build_source(cfg).captions("eval"):
            patch, query, projected, _ = model.image_features(paddle.to_tensor(eval_transform(cfg)(sample.image.open())[None]))
            if mode is FeatureMode.image:
                add(sample, image_embeds=query, image_embeds_proj=projected)
                continue
            for text in sample.captions:
                prepared = clean_caption(text) if cfg.task.clean_texts else text
                ids, mask = map(paddle.to_tensor, tokenizer.encode([prepared], max_length=cfg.task.max_txt_len))
                if mode is FeatureMode.text:
                    hidden = model.qformer.encode_text(ids, mask)
                    add(sample, text, text_embeds=hidden, text_embeds_proj=model.text_features(ids, mask))
                else:
                    add(sample, text, multimodal_embeds=model.qformer.encode_pair(patch, ids, mask))
        return {name: np.stack(found) for name, found in arrays.items()}, rows

    return make


def extract(cfg, run):
    return ExtractFeatures(cfg, run).run().metrics


def read(folder, names):
    """Arrays and rows of all shards, in order."""
    arrays, rows = {name: [] for name in names}, []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        found = load_file(path)
        lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        assert found.keys() == names and all(len(array) == len(lines) for array in found.values())
        rows += map(json.loads, lines)
        for name, array in found.items():
            arrays[name].append(array)
    for path in sorted(folder.glob("[0-9]*.parquet")):
        table = pq.read_table(path)
        for name in names:
            column, shape = table.column(name).combine_chunks(), [table.num_rows]
            while hasattr(column.type, "list_size"):
                shape.append(column.type.list_size)
                column = column.flatten()
            arrays[name].append(column.to_numpy().reshape(shape))
        rows += table.drop_columns(list(names)).to_pylist()
    return {name: np.concatenate(found) for name, found in arrays.items()}, rows


@pytest.mark.parametrize(
    ("mode", "format", "dtype"),
    [
        (FeatureMode.image, FeatureFormat.safetensors, FloatType.float32),
        (FeatureMode.image, FeatureFormat.parquet, FloatType.float16),
        (FeatureMode.text, FeatureFormat.parquet, FloatType.float32),
        (FeatureMode.multimodal, FeatureFormat.safetensors, FloatType.float16),
    ],
)
def test_the_files_hold_what_the_models_own_functions_give(config, run, expected, encoded, mode, format, dtype):
    arrays, rows = expected(mode)
    encoded.clear()
    metrics = extract(config(mode=mode, format=format, dtype=dtype), run)
    assert sum(encoded) == (0 if mode is FeatureMode.text else SCENES)
    assert metrics == {
        "rows": len(rows),
        "skipped": 0,
        "shards": -(-(len(rows) if mode is FeatureMode.text else SCENES) // SHARD),
    }
    found, index = read(run.folder / "features", arrays.keys())
    assert index == rows
    shapes = {
        FeatureMode.image: {"image_embeds": (QUERIES, WIDTH), "image_embeds_proj": (QUERIES, SHARED)},
        FeatureMode.text: {"text_embeds": (WIDTH,), "text_embeds_proj": (SHARED,)},
        FeatureMode.multimodal: {"multimodal_embeds": (QUERIES, WIDTH)},
    }[mode]
    for name, array in found.items():
        assert array.dtype == dtype.value and array.shape[1:] == shapes[name] and np.ptp(array, axis=0).max() > 1e-3
        # other batches round otherwise; float16 has 11 bits
        np.testing.assert_allclose(array, arrays[name], atol=1e-5 if dtype is FloatType.float32 else 4e-3, err_msg=name)
        if name.endswith("_proj"):
            np.testing.assert_allclose(np.linalg.norm(array.astype("float32"), axis=-1), 1, atol=1e-3)
    manifest = json.loads((run.folder / "features/manifest.json").read_text())
    assert manifest["complete"] and manifest["rows"] == len(rows) and manifest["dtype"] == dtype.value
    assert manifest["arrays"] == {name: list(shape) for name, shape in shapes.items()}


def test_an_images_keys_and_values_serve_all_its_texts(config, run, monkeypatch):
    made, look = [], QFormer.look
    monkeypatch.setattr(QFormer, "look", lambda qformer, patches: made.append(len(patches)) or look(qformer, patches))
    assert extract(config(mode=FeatureMode.multimodal), run)["rows"] > SCENES
    assert sum(made) == SCENES


def test_texts_are_cleaned_where_the_config_says_so(config, run, expected):
    cleaned, _ = expected(FeatureMode.text, clean_texts=True)
    as_they_are, _ = expected(FeatureMode.text, clean_texts=False)
    extract(config(mode=FeatureMode.text, clean_texts=True), run)
    found, _ = read(run.folder / "features", cleaned.keys())
    np.testing.assert_allclose(found["text_embeds"], cleaned["text_embeds"], atol=1e-5)
    assert np.abs(as_they_are["text_embeds"] - cleaned["text_embeds"]).max() > 1e-3


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_number_of_ranks_writes_the_same_bytes(config, run, over_ranks, tmp_path):
    cfg = config(mode=FeatureMode.multimodal)
    metrics = extract(cfg, run)
    alone = content(run.folder / "features")
    for ranks, tensor in ((2, 1), (4, 2)):
        assert over_ranks(ranks, lambda run: extract(cfg, run), tensor) == [metrics] * ranks
        assert content(tmp_path / "features") == alone
        shutil.rmtree(tmp_path / "features")


@pytest.mark.parametrize("format", FeatureFormat)
def test_a_run_that_was_killed_goes_on_behind_its_last_whole_shard(config, run, encoded, monkeypatch, tmp_path, format):
    cfg = config(format=format)
    metrics = extract(cfg, run)
    features, alone = run.folder / "features", content(run.folder / "features")
    features.rename(tmp_path / "alone")
    write, left = FeatureFiles.write, [0]

    def killed(files, shard, items, batches):
        if shard in left:
            return write(files, shard, items, batches)
        (features / f".{shard:05d}.{format.value}.partial").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureFiles, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        extract(cfg, run)
    assert not json.loads((features / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(FeatureFiles, "write", write)
    encoded.clear()
    assert extract(cfg, run) == metrics and encoded == [2, 1]
    assert content(features) == alone
    assert "1 of 3 shards are there already" in run.console.file.getvalue()


CHANGES = [
    ({"dataset": {"test_scenes": 6}}, "samples was 5, is 6"),
    ({"dataset": {"seed": 1}}, "samples_sha256 was"),
    ({"max_txt_len": 9}, "max_txt_len was 32, is 9"),
    ({"dtype": FloatType.float16}, 'dtype was "float32", is "float16"'),
]


def test_files_of_something_else_are_not_gone_on_with(config, run, monkeypatch):
    extract(config(), run)
    before = content(run.folder / "features")
    for change, said in CHANGES:
        with pytest.raises(UserError, match=rf"holds features of something else \(.*{said}.*choose another run_name"):
            extract(config(**change), run)
    stage1 = ModelLoader.stage1

    def other_numbers(loader):
        model, tokenizer = stage1(loader)
        model.temp.set_value(model.temp + 1)
        return model, tokenizer

    monkeypatch.setattr(ModelLoader, "stage1", other_numbers)
    with pytest.raises(UserError, match=r'model was \{"name": "tiny_opt", "sha256": '):
        extract(config(), run)
    assert content(run.folder / "features") == before


def test_pictures_of_ones_own_through_the_whole_command(words, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no picture")
    own = [f"task.inputs={pictures}", "dataset.on_bad_image=skip", f"paths.outputs={tmp_path}/outputs", "run_name=p"]
    cfg = compose_config([*words, *own, "resume=auto"])
    results = launch(cfg, ["x"])
    assert results["extract_features"] == {"rows": 3, "skipped": 1, "shards": 2}
    found, index = read(tmp_path / "outputs/p/features", {"image_embeds", "image_embeds_proj"})
    assert [row["name"] for row in index] == [str(pictures / name) for name in ("a.png", "b.jpg", "more/c.png")]
    assert [row["image_id"] for row in index] == [0, 1, 3] and len(found["image_embeds"]) == 3
    assert "broken.png" in (tmp_path / "outputs/p/skipped.txt").read_text()
    assert launch(cfg, ["x"]) == results


def test_a_shard_without_any_readable_picture_has_no_rows(config, pictures, run):
    for name in ("a.png", "b.jpg"):
        (pictures / name).write_bytes(b"")
    for format in FeatureFormat:
        cfg = config(inputs=[str(pictures)], format=format, dataset={"on_bad_image": OnBadImage.skip})
        assert extract(cfg, run) == {"rows": 1, "skipped": 2, "shards": 2}
        found, index = read(run.folder / "features", {"image_embeds", "image_embeds_proj"})
        assert len(index) == len(found["image_embeds"]) == 1
        if format is FeatureFormat.parquet:
            first, second = (pq.read_schema(path) for path in sorted((run.folder / "features").glob("*.parquet")))
            assert first == second
        shutil.rmtree(run.folder / "features")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["task.mode=text", "task.inputs=cat.jpg"],
            "task.mode=text needs texts, and the pictures of task.inputs come without any",
        ),
        (["task.inputs=[]"], r"task.inputs=\[\]: give files"),
        (["task.shard_size=0"], "task.shard_size must be at least 1"),
        (["task.mode=text", "task.max_txt_len=65"], "task.max_txt_len=65 is more than model.qformer.max_positions=64"),
        (["parallelism=tp2"], "task=extract_features has no frozen language model.*or share the image encoder with"),
        (["task.max_txt_len=2"], "task.max_txt_len must be at least 3"),
    ],
)
def test_mistakes_are_found_at_start_up(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        compose_config(["task=extract_features", *overrides])
