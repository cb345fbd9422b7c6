"""Fine-tuning on questions that the Q-Former reads, and answering them."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import paddle
import pytest

import blip2x
from blip2x.config.compose import compose_config
from blip2x.data.sources.digits import Digits
from blip2x.errors import UserError
from blip2x.models.qformer.qformer import rows_of
from blip2x.models.weights.manifest import read_manifest
from blip2x.tasks import vqa_finetune
from blip2x.tasks.common.launch import launch

FEW = ["task.max_steps=4", "task.batch_size=8", "task.log_every=2", "task.validation.max_images=5"]


def rows(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def alone(task, outputs, *overrides):
    """The run folder of a task that is told nothing else."""
    command = [f"task={task}", "dataset.train_scenes=64", "dataset.test_scenes=12", *overrides]
    command += [f"paths.outputs={outputs}", f"run_name={task}", "overwrite=true"]
    launch(compose_config(command), command)
    return outputs / task


@pytest.fixture(scope="module")
def start(trained, small):
    """Overrides of a small model of stage 2, and of the stage 1 that has what reads texts."""
    return [
        *small,
        f"model.weights={trained}/pretrain_stage2/checkpoint",
        f"model.qformer.weights={trained}/pretrain_stage1/checkpoint",
    ]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, start):
    """The checkpoint of a model that was fine-tuned on questions."""
    few = ["task.max_steps=1", "task.batch_size=8", "task.validation.max_images=2", "dataset.eval_limit=2"]
    return alone("vqa_finetune", tmp_path_factory.mktemp("tuned"), *start, *few) / "checkpoint"


@pytest.mark.parametrize("model", ["tiny_opt", pytest.param("tiny_t5", marks=pytest.mark.slow)])
def test_it_trains_and_its_checkpoint_answers_alike(run_task, demo, encoded, validations, watch_training, model):
    before = demo(f"model={model}")
    weights = [
        f"model.weights={before.checkpoint('pretrain_stage2')}",
        f"model.qformer.weights={before.checkpoint('pretrain_stage1')}",
    ]
    states = watch_training(vqa_finetune)
    encoded.clear()
    words = [f"model={model}", *weights, *FEW, "model.vision.frozen=false", "task.max_steps=12", "task.eval_every=6"]
    metrics, folder = run_task("vqa_finetune", *words, "logger=wandb_offline")
    assert sum(encoded) == 12 * 8 + 2 * 5 + 12  # in evaluation each image once, however many questions are asked about it
    half, last = validations(folder)
    assert (half["step"], last["step"]) == (6, 12)
    assert last["eval_loss"] < half["eval_loss"] and half["blind_eval_loss"] == last["blind_eval_loss"]

    first, then = states
    learned = {name for name in first if not np.array_equal(first[name], then[name])}
    assert not any(name.startswith("language.") for name in learned)
    for name in (
        "vision.blocks.0.attention.qkv.weight",
        "qformer.text.word_embeddings.weight",
        "qformer.text.position_embeddings.weight",
        "qformer.layers.0.text_ffn.fc1.weight",
        "qformer.query_tokens",
        "language_proj.weight",
    ):
        assert name in learned
    manifest = read_manifest(folder / "checkpoint")
    assert (manifest["kind"], manifest["step"]) == ("vqa_finetune", 12)
    assert set(manifest["tensors"]) == {name for name in first if not name.startswith("language.")}
    assert not any("head_" in name for name in manifest["tensors"])  # of captions

    tables = [json.loads(path.read_text()) for path in folder.glob("wandb/offline-run-*/files/media/table/*/examples_*.json")]
    assert [table["columns"] for table in tables] == [["image", "question", "prediction", "answers", "correct"]] * 2
    assert {len(table["data"]) for table in tables} == {8} and {row[0] for row in tables[0]["data"]} == {"Image"}

    written = rows(folder)
    assert len(written) > 24 and all(row["correct"] in (0, 1) for row in written)
    assert sum((folder / row["attention"]).is_file() for row in written if "attention" in row) == 12
    checkpoint = folder.rename(folder.with_name("tuned")) / "checkpoint"
    encoded.clear()
    again, folder = run_task("vqa_finetune", "model=auto", f"model.weights={checkpoint}", "task.train=false")
    assert again == metrics and rows(folder) == written and sum(encoded) == 12


def test_the_question_changes_what_is_seen(run_task, start, monkeypatch):
    """Also when the language model is asked the same."""
    seen, write = [], vqa_finetune.HeldOutQuestions._queries

    def spy(held_out, image, questions):
        assert isinstance(image, list)  # keys and values, which were made once for all of an image's questions
        # the small tokenizer knows no digits, so that some questions are one to it; not those of another kind
        others = [one for one in questions if one.question.split()[0] != questions[0].question.split()[0]]
        if others:
            first = rows_of(image, paddle.to_tensor([0]))
            one = write(held_out, first, questions[:1])
            seen.append(float((one - write(held_out, first, others[:1])).abs().max()))
        return write(held_out, image, questions)

    monkeypatch.setattr(vqa_finetune.HeldOutQuestions, "_queries", spy)
    run_task("vqa_finetune", *start, *FEW, "task.max_steps=1")
    assert len(seen) > 5 and min(seen) > 1e-3


@pytest.mark.parametrize("task", ["vqa_zeroshot", "caption", "pretrain_stage2", "predict"])
def test_tasks_that_show_the_q_former_no_question_refuse_such_a_model(run_task, tuned, small, pictures, task):
    inputs = [f"task.inputs={pictures}/a.png"] if task == "predict" else []
    with pytest.raises(UserError, match=f"task={task} does not show them to it; use task=vqa_finetune task.train=false"):
        run_task(task, *small, f"model.weights={tuned}", *inputs)


def test_such_a_model_is_told_from_python_and_converted_as_a_whole(run_task, tuned, small, tmp_path):
    with pytest.raises(UserError, match="fine-tuned on questions"):
        blip2x.load(tuned)
    metrics, folder = run_task("vqa_finetune", *small, f"model.weights={tuned}", "task.train=false")
    written = rows(folder)
    with pytest.raises(UserError, match="Hugging Face's BLIP-2 has no Q-Former that reads questions"):
        alone("convert", tmp_path, *small, f"model.weights={tuned}", "task.to=huggingface")
    whole = alone("convert", tmp_path, *small, f"model.weights={tuned}", "task.to=blip2x") / "converted"
    assert {path.name for path in (whole / "tokenizers").iterdir()} == {"qformer", "language"}
    again, folder = run_task("vqa_finetune", *small, f"model.weights={whole}", "task.train=false")
    assert again == metrics and rows(folder) == written


def test_what_was_not_fine_tuned_is_not_evaluated(run_task, start):
    with pytest.raises(UserError, match=r"has no Q-Former that reads them; set model.weights to a checkpoint of vqa_finetune"):
        run_task("vqa_finetune", *start, "task.train=false")


def test_without_what_reads_questions_it_is_told_what_to_do_before_work(run_task, start, tmp_path):
    with pytest.raises(UserError, match=r"set model.qformer.weights to weights of stage 1"):
        run_task("vqa_finetune", *start[:-1], *FEW)
    assert not (tmp_path / "vqa_finetune").exists()


def test_a_split_without_answers_is_predicted_and_not_scored(run_task, start, monkeypatch):
    questions = Digits.questions

    def kept_secret(source, split):
        found = questions(source, split)
        return [replace(one, answers=()) for one in found] if split != "train" else found

    monkeypatch.setattr(Digits, "questions", kept_secret)
    metrics, folder = run_task("vqa_finetune", *start, *FEW, "task.max_steps=1")
    assert "accuracy" not in metrics and len(rows(folder)) > 24 and {row["correct"] for row in rows(folder)} == {None}
    with pytest.raises(UserError, match="no question to validate on has a known answer"):
        run_task("vqa_finetune", *start, *FEW, "task.keep_best=1", "run_name=told")
    assert not (folder.parent / "told").exists()


def test_a_validation_scores_lemmas_where_the_evaluation_does(monkeypatch):
    monkeypatch.setattr(vqa_finetune, "lemmatise", lambda texts: [text.removesuffix("s") for text in texts])
    question = Digits(compose_config(["dataset.train_scenes=1", "dataset.test_scenes=1"]).dataset).questions("eval")[0]
    pairs = [(replace(question, answers=("cat",)), {"prediction": "cats"})]
    for lemmatise, accuracy in (("true", 100), ("false", 0)):
        cfg = compose_config(["task=vqa_finetune", f"task.lemmatise={lemmatise}"])
        assert vqa_finetune.HeldOutQuestions(cfg, Mock(), None, None, [question])._accuracy(pairs) == accuracy


def test_questions_without_answers_cannot_be_learned(run_task, start, monkeypatch):
    questions = Digits.questions
    monkeypatch.setattr(Digits, "questions", lambda *words: [replace(one, answers=()) for one in questions(*words)[:1]])
    with pytest.raises(UserError, match=r"the questions of digits to train on have no answers"):
        run_task("vqa_finetune", *start, *FEW)
