"""Which stages run, with which config, and which weights they start from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.weights.manifest import frozen_origins
from blip2x.tasks.common.launch import launch
from blip2x.tasks.pipeline import Pipeline, Stage, plan_stages

DEMO = ["pretrain_language", "pretrain_vision", "pretrain_stage1", "pretrain_stage2", "caption", "vqa_zeroshot"]


def plan(*command):
    return plan_stages(compose_config(list(command)).task)


def test_the_demo_runs_every_stage():
    assert [stage.name for stage in plan()] == DEMO


def test_a_stage_is_left_out_where_its_key_is_set():
    assert [stage.name for stage in plan("model.vision.weights=eva")] == [name for name in DEMO if name != "pretrain_vision"]
    assert [stage.name for stage in plan("model=opt2.7b", "dataset=coco")] == DEMO[2:]


def test_a_stages_own_overrides_count_for_unless():
    stage = "{task: pretrain_vision, unless: model.vision.weights, overrides: ['%s']}"
    command = "model.vision.weights=eva"
    assert plan(f"task.stages=[{stage % command}]") == []
    assert len(plan(f"task.stages=[{stage % 'model.vision.weights=null'}]", command)) == 1


@pytest.mark.parametrize("key", ["model.vison.weights", "model.weights.x", "nothing"])
def test_unless_has_to_be_a_key(key):
    with pytest.raises(UserError, match=f"pretrain_vision has unless={key}, which is no key of the config"):
        plan(f"task.stages=[{{task: pretrain_vision, unless: {key}}}]")


@pytest.mark.parametrize("word", ["precision=bf16", "parallelism.dp=2", "seed=3", "resume=auto"])
def test_what_all_stages_share_is_not_set_by_one(word):
    with pytest.raises(UserError, match=f"pretrain_vision has {word}, which all stages share; give it to the whole command"):
        plan(f"task.stages=[{{task: pretrain_vision, overrides: ['{word}']}}]")


def test_what_belongs_to_the_pipeline_is_not_handed_to_its_stages():
    command = ["task=pipeline", "run_name=r", "+overwrite=true", "task.stages=[{task: caption, name: c}]", "seed=7"]
    task = compose_config(["task.stages=[{task: caption, name: c}]"]).task
    (stage,) = plan_stages(replace(task, overrides=command))
    assert stage == Stage("c", ["seed=7"], ["task=caption"])


def test_a_stages_overrides_win_over_the_commands_and_the_recipes():
    stages = "task.stages=[{task: pretrain_stage1, overrides: ['optim.lr=2e-4', 'task.batch_size=3']}]"
    (stage,) = plan(stages, "optim.lr=1e-4", "optim.warmup_steps=9")
    cfg = stage.config({})
    assert (cfg.task.kind, cfg.optim.lr, cfg.optim.warmup_steps, cfg.task.batch_size) == ("pretrain_stage1", 2e-4, 9, 3)
    assert cfg.optim.clip_grad_norm == 1.0  # of conf/recipe/digits/pretrain_stage1.yaml


def test_a_typed_optimizer_replaces_every_stages_recipe_and_a_stages_own_wins():
    stages = "task.stages=[{task: pretrain_stage1}, {task: pretrain_language, overrides: ['optim=finetune_caption']}]"
    first, second = (stage.config({}) for stage in plan(stages, "optim=adamw", "optim.warmup_steps=9"))
    expected = {name: compose_config(["task=convert", f"optim={name}"]).optim for name in ("adamw", "finetune_caption")}
    assert first.optim == replace(expected["adamw"], warmup_steps=9) and first.task.max_steps == 300
    assert second.optim == replace(expected["finetune_caption"], warmup_steps=9) and second.task.max_steps == 900


def test_handed_weights_win_over_the_commands_and_not_over_the_stages():
    handed = {"model.weights": "it's/a ${path}"}
    assert Stage("s", ["model.weights=typed"], ["task=caption"]).config(handed).model.weights == "it's/a ${path}"
    own = ["task=caption", "model.weights=own"]
    assert Stage("s", ["model.weights=typed"], own).config(handed).model.weights == "own"


@pytest.fixture
def check(small):
    """`check(*overrides)`, as if they had been typed."""

    def call(*overrides):
        Pipeline.check(compose_config([*small, "dataset.train_scenes=8", "dataset.test_scenes=4", *overrides]))

    return call


def test_the_demo_can_start_with_nothing(check):
    check()


def test_tasks_that_are_no_stage_are_named(check):
    with pytest.raises(UserError, match=r"task\.stages: prepare is no stage of a pipeline; run it alone"):
        check("dataset=digits", "task.stages=[{task: prepare}]")


def test_every_stage_is_checked_before_the_first_one_starts(check, trained):
    with pytest.raises(UserError, match=r"^model.vision.frozen=true"):
        check("task.stages=[{task: pretrain_stage1}]")
    with pytest.raises(UserError, match=r"^model.language.frozen=true"):  # stage 1 promises no language model
        check("task.stages=[{task: pretrain_vision},{task: pretrain_stage1},{task: pretrain_stage2}]")
    with pytest.raises(UserError, match="task=caption needs a trained model"):
        check("task.stages=[{task: pretrain_vision},{task: pretrain_language},{task: caption}]")
    with pytest.raises(UserError, match=r"^model.weights=/no: there is no /no"):
        check("task.stages=[{task: pretrain_vision},{task: pretrain_stage1, overrides: ['model.weights=/no']}]")


def test_a_later_stage_finds_the_parts_of_an_earlier_ones_checkpoint(check, trained):
    parts = [f"model.{part}.weights={trained}/pretrain_{part}/checkpoint" for part in ("vision", "language")]
    stage1, stage2 = "{task: pretrain_stage1}", f"{{task: pretrain_stage2, overrides: ['{parts[1]}']}}"
    check(f"task.stages=[{stage1},{stage2},{{task: caption}},{{task: vqa_zeroshot}}]", parts[0])


def test_weights_go_from_stage_to_stage(small, tmp_path):
    steps = "'task.batch_size=4','task.max_steps=1','task.max_epochs=null','task.eval_batch_size=4'"
    stages = ",".join(
        f"{{task: {task}, name: {name}, overrides: [{steps}]}}"
        for task, name in (("pretrain_vision", "see"), ("pretrain_stage1", "align"))
    )
    command = [
        *small, "dataset.train_scenes=8", "dataset.test_scenes=4", "dataset.held_out_combinations=0",
        f"paths.outputs={tmp_path}", "run_name=r", f"task.stages=[{stages}]",
    ]  # fmt: skip
    results = launch(compose_config(command), ["x"])
    assert json.loads((tmp_path / "r/results.json").read_text()) == results
    assert [name for name in results if isinstance(results[name], dict)] == ["see", "align"]
    assert frozen_origins(tmp_path / "r/align/checkpoint") == {"vision": str(tmp_path / "r/see/checkpoint")}
    stages = [json.loads(line)["stage"] for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["see", "align"]


def test_a_stages_own_weights_count_though_earlier_stages_promise_others(check, trained):
    stages = "task.stages=[{task: pretrain_stage1},{task: caption, overrides: ['model.weights=%s']}]"
    vision = f"model.vision.weights={trained}/pretrain_vision/checkpoint"
    check(stages % f"{trained}/pretrain_stage2/checkpoint", vision)
    with pytest.raises(UserError, match=r"^model\.weights=/no: there is no /no"):
        check(stages % "/no", vision)


def test_a_stage_that_cannot_start_from_the_one_before_is_refused(check, trained):
    parts = [f"model.{part}.weights={trained}/pretrain_{part}/checkpoint" for part in ("vision", "language")]
    both = "{task: pretrain_stage1},{task: pretrain_stage2}"
    with pytest.raises(UserError, match="retrieval would start from the weights of pretrain_stage2, but task=retrieval needs"):
        check(f"task.stages=[{both},{{task: retrieval}}]", *parts)
    own = f"overrides: ['model.weights={trained}/pretrain_stage1/checkpoint']"
    check(f"task.stages=[{both},{{task: retrieval, {own}}}]", *parts)
    with pytest.raises(UserError, match="c would start from the weights of pretrain_stage1, but task=caption needs"):
        check("task.stages=[{task: pretrain_stage1},{task: caption, name: c}]", *parts)
    tuned = "{task: caption, overrides: ['task.train=true','task.max_steps=1','task.max_epochs=null']}"
    check(f"task.stages=[{both},{tuned},{{task: vqa_zeroshot}}]", *parts)


def test_fine_tuning_on_questions_has_its_texts_from_stage_1(check, trained):
    parts = [f"model.{part}.weights={trained}/pretrain_{part}/checkpoint" for part in ("vision", "language")]
    stages = "task.stages=[%s{task: pretrain_stage2},{task: vqa_finetune},{task: vqa_finetune, name: v, overrides: ['%s']}]"
    check(stages % ("{task: pretrain_stage1},", "task.train=false"), *parts)
    stage1 = f"{trained}/pretrain_stage1/checkpoint"
    with pytest.raises(UserError, match="the checkpoint of the stage before lacks what reads texts in the Q-Former"):
        check(stages % ("", "task.train=false"), f"model.weights={stage1}", *parts)
    check(stages % ("", "task.train=false"), f"model.weights={stage1}", f"model.qformer.weights={stage1}", *parts)
    with pytest.raises(
        UserError, match="v would start from the weights of pretrain_stage2, but task=vqa_finetune needs those of"
    ):
        evaluated = "{task: vqa_finetune, name: v, overrides: ['task.train=false']}"
        check(f"task.stages=[{{task: pretrain_stage1}},{{task: pretrain_stage2}},{evaluated}]", *parts)


def test_the_q_former_of_an_earlier_stage_goes_with_its_whole_model_only():
    handed = {"model.weights": "a", "model.qformer.weights": "b"}
    assert Stage("s", [], ["task=caption"]).given(handed) == set(handed)
    assert Stage("s", [], ["task=caption", "model.weights=c"]).given(handed) == set()
    own = Stage("s", ["model.qformer.weights=typed"], ["task=pretrain_stage1", "model.weights=null"])
    assert own.config(handed).model.qformer.weights == "typed" and own.config(handed).model.weights is None
