"""What is wrong with data and weights is told by `check`, before long work starts."""

from __future__ import annotations

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.registry import TASKS
from blip2x.tasks.common.task import Task

FEW = ["dataset.train_scenes=20", "dataset.test_scenes=8"]


@pytest.fixture
def check(small):
    """`check(task, *overrides, promised=())`."""

    def call(task, *overrides, promised=()):
        cfg = compose_config([f"task={task}", *small, *FEW, *overrides])
        TASKS.get(task).check(cfg, frozenset(promised))

    return call


@pytest.mark.parametrize("task", ["caption", "vqa_zeroshot", "pretrain_stage2", "predict"])
def test_a_missing_model_is_named_with_its_key(check, task, pictures):
    inputs = [f"task.inputs={pictures}"] if task == "predict" else []
    with pytest.raises(UserError, match=rf"^task={task} needs a trained model: set model.weights to"):
        check(task, *inputs)


@pytest.mark.parametrize("key", ["model.weights", "model.vision.weights", "model.language.weights"])
def test_weights_that_are_not_there_are_named_with_their_key(check, trained, key):
    with pytest.raises(UserError, match=rf"^{key}=/no/such: there is no /no/such"):
        check("caption", f"model.weights={trained}/pretrain_stage2/checkpoint", f"{key}=/no/such")


@pytest.mark.parametrize("task", ["caption", "vqa_zeroshot"])
def test_a_checkpoint_of_stage_1_is_refused_where_stage_2_is_needed(check, trained, task):
    with pytest.raises(UserError, match=f"is a checkpoint of pretrain_stage1, but task={task} needs one of pretrain_stage2"):
        check(task, f"model.weights={trained}/pretrain_stage1/checkpoint")


def test_a_frozen_part_without_weights_is_named(check, trained):
    with pytest.raises(UserError, match=r"^model.vision.frozen=true, but nothing says .* set model.vision.weights"):
        check("pretrain_stage1")
    check("pretrain_stage1", "model.vision.frozen=false")
    check("pretrain_stage1", f"model.vision.weights={trained}/pretrain_vision/checkpoint")


def test_a_stage_1_checkpoint_does_not_tell_where_the_language_model_is(check, trained):
    whole = f"model.weights={trained}/pretrain_stage1/checkpoint"
    with pytest.raises(UserError, match=r"^model.language.frozen=true"):
        check("pretrain_stage2", whole)
    check("pretrain_stage2", whole, f"model.language.weights={trained}/pretrain_language/checkpoint")


def test_what_the_checkpoint_remembers_need_not_be_set(check, trained):
    whole = f"model.weights={trained}/pretrain_stage2/checkpoint"
    for task in ("caption", "vqa_zeroshot", "pretrain_stage2"):
        check(task, whole)


def test_promised_weights_need_not_be_there(check):
    check("pretrain_stage1", promised=["model.vision.weights"])
    with pytest.raises(UserError, match=r"^model.language.frozen=true"):
        check("pretrain_stage2", promised=["model.vision.weights", "model.weights"])
    check("pretrain_stage2", promised=["model.vision.weights", "model.weights", "model.language.weights"])


def test_a_metric_that_no_validation_gives_is_named_where_there_is_a_training(check):
    """Recipes name one for fine-tuning, and are read for captions that are only written, too."""
    all_parts = ["model.vision.weights", "model.weights", "model.language.weights"]
    check("caption", "task.train=false", "task.best_metric=nothing", promised=all_parts)
    check("caption", "task.train=true", "task.best_metric=CIDEr", promised=all_parts)
    with pytest.raises(UserError, match=r"^task.best_metric=nothing: choose one of .*CIDEr"):
        check("caption", "task.train=true", "task.best_metric=nothing", promised=all_parts)
    with pytest.raises(UserError, match=r"^task.best_metric=CIDEr: this task has no validation, so set it to null"):
        check("pretrain_language", "task.best_metric=CIDEr")


def test_a_whole_models_checkpoint_promises_its_parts():
    cfg = compose_config(["task=pretrain_stage2"])
    assert TASKS.get("pretrain_stage2").promises(cfg) == {"model.weights", "model.vision.weights", "model.language.weights"}
    assert TASKS.get("pretrain_language").promises(cfg) == {"model.language.weights"}
    caption, all_parts = TASKS.get("caption"), TASKS.get("pretrain_stage2").promises(cfg)
    assert caption.promises(compose_config(["task=caption"])) == set()
    assert caption.promises(compose_config(["task=caption", "task.train=true"])) == all_parts
    of_stage1 = TASKS.get("pretrain_stage1").promises(compose_config(["task=pretrain_stage1", "model.weights=x"]))
    assert of_stage1 == {"model.weights", "model.vision.weights", "model.qformer.weights"}


def test_data_that_is_not_there_is_told(small, trained, tmp_path):
    cfg = compose_config(
        [
            *small, "task=vqa_zeroshot", "dataset=custom", f"dataset.images={tmp_path}", "model.vision.frozen=false",
            f"model.weights={trained}/pretrain_stage2/checkpoint",
        ]
    )  # fmt: skip
    with pytest.raises(UserError, match=r"data set 'custom' has no questions for eval; set dataset.eval_questions"):
        TASKS.get("vqa_zeroshot").check(cfg)


def test_the_data_set_is_built_when_it_is_asked_for(run):
    task = Task(compose_config(["task=caption", "dataset=custom", "dataset.images=/no/where"]), run)
    with pytest.raises(UserError, match="image folder /no/where does not exist"):
        _ = task.source
