"""The field's data sets from their owners' files to a score: prepared from a server, read, evaluated or trained on."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from blip2x.config.compose import compose_config
from blip2x.engine.loggers import Loggers
from blip2x.engine.run import Run
from blip2x.parallel.context import Context
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.launch import launch
from blip2x.tasks.prepare import Prepare
from tests.data import layouts
from tests.web_server import serve

SIZES = {  # images with captions, questions: of train, val, eval; None: the data set has no such thing
    "coco": ((2, 1, 1), None),
    "vg": ((2, 2, 2), None),
    "cc3m": ((3, 3, 3), None),
    "cc12m": ((3, 3, 3), None),
    "sbu": ((3, 3, 3), None),
    "ccs": ((3, 3, 3), None),
    "laion": ((4, 4, 4), None),
    "nocaps": ((None, 2, 2), None),
    "flickr30k": ((1, 1, 1), None),
    "coco_vg": ((4, 1, 1), None),
    "coco_vg_ccs_laion": ((11, 1, 1), None),
    "vqav2": (None, (6, 12, 12)),
    "vqav2_vg": (None, (20, 3, 3)),
    "vg_qa": (None, (2, 2, 2)),
    "okvqa": (None, (6, 12, 12)),
    "gqa": (None, (1, 1, 1)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`data(name)`: the folder in which a tiny one of that data set lies, prepared from a server."""
    folder, done = tmp_path_factory.mktemp("data"), set()

    def prepare(name: str) -> str:
        if name not in done:
            with pytest.MonkeyPatch.context() as patch, serve(patch) as web:
                patch.setattr("blip2x.transfer.linked_picture.WAITS", (0,))
                cfg = layouts.publish(compose_config([f"dataset={name}", "task=prepare", f"paths.data={folder / name}"]), web)
                layouts.put_by_hand(cfg, web)
                console = Console(file=io.StringIO(), width=200)
                Prepare(cfg, Run(folder, folder, "s", Context(), console, Loggers())).run()
            done.add(name)
        return str(folder / name)

    return prepare


@pytest.mark.parametrize("name", SIZES)
def test_what_was_prepared_can_be_read(data, name):
    source = build_source(compose_config([f"dataset={name}", "task=prepare", f"paths.data={data(name)}"]))
    captions, questions = SIZES[name]
    for read, sizes in ((source.captions, captions), (source.questions, questions)):
        for split, size in zip(("train", "val", "eval"), sizes or (), strict=bool(sizes)):
            if size is not None:
                samples = read(split)
                assert len(samples) == size, (name, split)
                assert all(sample.image.open().size[0] == 32 for sample in samples)
    assert source.skipped == []


@pytest.fixture
def evaluate(demo, data, tmp_path):
    """`evaluate(task, data set, overrides)` -> metrics, and the run's folder, of the demo's model."""

    def run(task: str, name: str, *overrides: str):
        stage = "pretrain_stage1" if task in ("retrieval", "pretrain_stage1") else "pretrain_stage2"
        command = [
            f"task={task}", f"dataset={name}", f"paths.data={data(name)}", f"paths.outputs={tmp_path}", "run_name=run",
            "dataset.transform.mean=[0.5,0.5,0.5]", "dataset.transform.std=[0.5,0.5,0.5]", "dataset.num_workers=0",
            f"model.weights={demo().checkpoint(stage)}", "task.eval_batch_size=4", *overrides,
        ]  # fmt: skip
        if task in ("caption", "vqa_zeroshot"):
            command += ["task.num_beams=1", "task.max_new_tokens=4", "task.min_new_tokens=1"]
        return launch(compose_config(command), command)[task], tmp_path / "run"

    return run


def rows(folder, name):
    return json.loads((folder / name).read_text())


def test_coco_captions(evaluate):
    metrics, folder = evaluate("caption", "coco", "task.metrics=[BLEU,ROUGE_L,CIDEr]")
    assert metrics["images"] == 1 and {"BLEU-4", "ROUGE_L", "CIDEr"} <= metrics.keys()
    assert [row["image_id"] for row in rows(folder, "leaderboard.json")] == [layouts.VAL[2]]


def test_nocaps_by_domain_and_its_test_split_without_truth(evaluate):
    metrics, _ = evaluate("caption", "nocaps", "task.metrics=[ROUGE_L]")
    assert {"ROUGE_L", "in-domain/ROUGE_L", "out-domain/ROUGE_L"} <= metrics.keys() and metrics["images"] == 2
    metrics, folder = evaluate("caption", "nocaps", "dataset.eval_split=test", "overwrite=true")
    assert metrics == {"images": 1}
    assert rows(folder, "leaderboard.json")[0].keys() == {"image_id", "caption"}


def test_flickr30k_retrieval(evaluate):
    metrics, _ = evaluate("retrieval", "flickr30k", "task.k_test=4")
    assert metrics["i2t_recall@1"] == metrics["t2i_recall@1"] == metrics["chance"] == 1  # a single image


def test_vqav2_and_its_test_questions_without_truth(evaluate):
    metrics, folder = evaluate("vqa_zeroshot", "vqav2")
    assert (metrics["questions"], metrics["images_encoded"], metrics["questions_per_image_encoded"]) == (12, 4, 3)
    kinds = {f"accuracy/answer_type/{kind}" for kind in ("yes/no", "number", "other")}
    assert kinds | {"accuracy", "accuracy/question_type/how many", "ci95_low_accuracy"} <= metrics.keys()
    assert rows(folder, "leaderboard.json")[0].keys() == {"question_id", "answer"}
    metrics, folder = evaluate("vqa_zeroshot", "vqav2", "dataset.eval_split=test-dev", "overwrite=true")
    assert "accuracy" not in metrics and metrics["questions"] == len(rows(folder, "leaderboard.json")) == 3


@pytest.mark.parametrize(("name", "rules"), [("okvqa", "vqa_lavis"), ("gqa", "gqa_lavis")])
def test_other_questions(evaluate, name, rules):
    metrics, folder = evaluate("vqa_zeroshot", name, "task.lemmatise=false")
    assert 0 <= metrics["accuracy"] <= 100
    assert f"answer_rules: {rules}" in (folder / "config.yaml").read_text()


def test_pretraining_on_the_whole_mixture(evaluate):
    short = ["task.batch_size=8", "task.max_steps=3", "task.max_epochs=null", "task.keep_best=0", "optim.warmup_steps=0"]
    weights = ["dataset.parts.laion.weight=2", "dataset.parts.ccs.weight=0.7"]
    metrics, folder = evaluate("pretrain_stage1", "coco_vg_ccs_laion", *short, *weights, "task.validation.captions=false")
    assert metrics["i2t_recall@1"] == 1
    assert (folder / "checkpoint" / "manifest.json").is_file()
