"""A mistake in the configuration is one sentence that names the key, at start-up."""

from __future__ import annotations

import re

import pytest

from blip2x.config.compose import compose_config
from blip2x.errors import UserError

MISTAKES = {
    "task.num_beems=3": "num_beems",
    "modle=opt2.7b": "modle",
    "model=opt3b": "opt3b",
    "task=cation": "cation",
    "optim.lr=fast": "lr",
    "model.vision.depth=two": "depth",
    "task.stages=[{task: vqa}]": "unknown task 'vqa'; known: audit, benchmark, caption,",
    "task.stages=[]": "empty",
    "task.stages=[{task: caption},{task: caption}]": "more than once",
    "task.stages=[{task: caption, name: ../x}]": "plain folder name",
    "dataset.on_bad_image=ignore": "on_bad_image",
    "dataset.kind=numbers": "unknown dataset 'numbers'; known: custom, digits, image_text",
    "parallelism.kind=many": "unknown parallelism 'many'",
    "model.vision.kind=resnet": "unknown vision encoder 'resnet'",
    "model.vision.num_heads=7": "not a multiple",
    "model.vision.image_size=50": "model.vision.image_size=50",
    "model.temperature=0": "temperature",
    "dataset.transform.mean=[0.5]": "3 numbers",
    "dataset.transform.crop_scale=[1.0,0.5]": "crop_scale",
    "device=tpu": "device",
    "seed=-1": "seed must be at least 0",
    "threads=0": "threads must be at least 1",
    "dataset.eval_limit=0": "dataset.eval_limit must be at least 1, got 0",
    "dataset.num_workers=-1": "dataset.num_workers",
    "dataset.max_pixels=0": "dataset.max_pixels",
    "optim.lr=0": "optim.lr must be above 0",
    "optim.lr=nan": "optim.lr must be above 0 and finite, got nan",
    "optim.lr=1e-6": "optim.eta_min=1e-05 is above optim.lr=1e-06",
    "optim.warmup_start_lr=-1e-6": "optim.warmup_start_lr must be at least 0",
    "optim.warmup_steps=-1": "optim.warmup_steps must be at least 0",
    "optim.eta_min=-1": "optim.eta_min must be at least 0",
    "optim.weight_decay=-0.05": "optim.weight_decay must be at least 0",
    "optim.beta1=-0.1": "optim.beta1 must be at least 0 and below 1",
    "optim.beta2=1.0": "optim.beta2 must be at least 0 and below 1",
    "optim.eps=0": "optim.eps must be above 0",
    "optim.clip_grad_norm=0": "optim.clip_grad_norm must be above 0",
    "model.vision.patch_size=0": "model.vision.patch_size must be at least 1",
    "model.vision.drop_path_rate=1": "model.vision.drop_path_rate",
    "model.qformer.dropout=1.0": "model.qformer.dropout must be at least 0 and below 1",
    "model.qformer.num_queries=0": "model.qformer.num_queries",
    "model.qformer.cross_attention_every=0": "model.qformer.cross_attention_every",
    "model.language.dropout=-0.1": "model.language.dropout",
    "model.language.num_heads=7": "model.language.width=96 is not a multiple of model.language.num_heads=7",
    "model.ln_vision_eps=0": "model.ln_vision_eps",
}
TASK_MISTAKES = {
    "caption": {
        "task.max_epochs=null": "task.max_steps and task.max_epochs",
        "task.max_steps=10": "task.max_steps and task.max_epochs",
        "task.metrics=[CIDER]": "unknown value 'CIDER'; known: BLEU",
        "task.batch_size=0": "task.batch_size must be at least 1, got 0",
        "task.save_every=0": "task.save_every must be at least 1",
        "task.max_txt_len=2": "task.max_txt_len must be at least 3",
        "task.min_new_tokens=31": "task.min_new_tokens=31 is more than task.max_new_tokens=30",
        "task.num_beams=0": "task.num_beams",
    },
    "prepare": {
        "task.parallel=0": "task.parallel must be at least 1, got 0",
        "task.links.connections=0": "task.links.connections must be at least 1",
        "task.links.attempts=0": "task.links.attempts must be at least 1",
        "task.links.timeout=0": "task.links.timeout must be above 0",
        "task.links.max_mb=-1": "task.links.max_mb must be above 0",
        "task.links.max_side=0": "task.links.max_side must be at least 1",
        "task.verfy=true": "verfy",
    },
    "pretrain_language": {"task.max_txt_len=129": "model.language.max_positions=128"},
    "pretrain_stage1": {
        "task.max_txt_len=65": "model.qformer.max_positions=64",
        "task.itm_weight=-1": "task.itm_weight must be at least 0",
        "task.label_smoothing=1": "task.label_smoothing must be at least 0 and below 1",
        "task.contrast_steps=-1": "task.contrast_steps",
        "task.validation.max_images=0": "task.validation.max_images must be at least 1",
        "task.validation.num_beams=0": "task.validation.num_beams must be at least 1",
        "task.validation.min_new_tokens=19": "validation.min_new_tokens=19 is more than task.validation.max_new_tokens=18",
        "task.validation.max_new_tokens=65": "task.validation.max_new_tokens=65 is more than model.qformer.max_positions=64",
    },
    "pretrain_stage2": {
        "task.max_txt_len=121": "task.max_txt_len=121 and 8 queries",
        "task.validation.max_new_tokens=121": "task.validation.max_new_tokens=121 and 8 queries",
    },
    "vqa_zeroshot": {
        "task.prompt=Answer": "task.prompt='Answer' has no {}",
        "task.eval_batch_size=0": "task.eval_batch_size",
        "task.top_p=0": "task.top_p must be above 0 and at most 1",
        "task.temperature=0": "task.temperature",
        "task.length_penalty=inf": "task.length_penalty",
        "task.max_new_tokens=121": "task.max_new_tokens=121 and 8 queries",
    },
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_is_named(override):
    with pytest.raises(UserError, match=re.escape(MISTAKES[override])):
        compose_config([override])


@pytest.mark.parametrize(("task", "override"), [(task, override) for task in TASK_MISTAKES for override in TASK_MISTAKES[task]])
def test_mistake_of_a_task_is_named(task, override):
    with pytest.raises(UserError, match=re.escape(TASK_MISTAKES[task][override])):
        compose_config([f"task={task}", override])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["task=predict", "task.inputs=[x.jpg]", "task.stage=3"], "task.stage"),
        (["task=predict"], "task.inputs"),
        (["task=predict", "task.inputs=[]"], r"task.inputs=\[\]: give files"),
        (["task=predict", "task.inputs=['']"], "give files"),
        (["task=predict", "task.inputs=x.jpg", "task.prompt='Question: {} Answer:'"], "no question to put there"),
        (["task=predict", "task.inputs=x.jpg", "task.stage=1", "task.prompt=a photo of"], "the Q-Former takes no prompt"),
        (["task=predict", "task.inputs=x.jpg", "task.stage=1", "task.max_new_tokens=65"], "model.qformer.max_positions=64"),
        (["task=caption", "task.train=true", "task.max_txt_len=121"], "task.max_txt_len=121 and 8 queries"),
        (["dataset=custom"], "dataset.images"),
        (["optim.layer_decay=0"], "optim.layer_decay must be above 0 and at most 1, got 0"),
        (["optim.layer_decay=1.1"], "optim.layer_decay must be above 0 and at most 1, got 1.1"),
        (
            ["task=pretrain_stage2", "optim.layer_decay=0.9"],
            "optim.layer_decay=0.9 .* task=pretrain_stage2 does not train with model.vision.frozen=true",
        ),
        (["task=caption", "task.train=true", "dataset=coco", "optim.layer_decay=0.9"], "optim.layer_decay=0.9 .* task=caption"),
        (
            ["task=pretrain_language", "model.vision.frozen=false", "optim.layer_decay=0.9"],
            "which task=pretrain_language does not train; set",
        ),
        (["logger=wandb", "logger.wandb.mode=sometimes"], "logger.wandb.mode"),
        (["logger=wandb", "logger.wandb.finish_seconds=0"], "logger.wandb.finish_seconds"),
        (["logger=[tensorboard]", "logger.tensorboard.rows=-1"], "logger.tensorboard.rows"),
        (["parallelism=dp", "parallelism.sharding_stage=4"], "parallelism.sharding_stage"),
        (["task=pretrain_stage1", "task.itc_weight=0", "task.itm_weight=0", "task.lm_weight=0"], "nothing to learn"),
    ],
)
def test_mistake_of_an_option_is_named(overrides, named):
    with pytest.raises(UserError, match=named):
        compose_config(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.clip_grad_norm=null", "dataset.eval_limit=null", "threads=null", "model.qformer.vocab_size=null"],
        ["optim.weight_decay=0", "optim.warmup_steps=0", "optim.eta_min=0", "optim.beta1=0", "dataset.num_workers=0"],
        ["task=pretrain_language", "task.max_txt_len=128"],  # as long as the positions
        ["task=pretrain_stage1", "task.itc_weight=0", "task.label_smoothing=0"],
        ["task=caption", "task.top_k=0", "task.min_new_tokens=30"],
        ["task=caption", "task.max_txt_len=121"],  # nothing is trained
        ["task=pretrain_stage1", "model.vision.frozen=false", "optim.layer_decay=0.9"],
        ["task=pretrain_vision", "optim.layer_decay=0.9"],
        ["task=caption", "optim.layer_decay=0.9"],  # nothing is trained
        ["optim.layer_decay=0.9"],  # a pipeline's stages say for themselves
        ["task=vqa_zeroshot", "model=tiny_t5", "task.max_new_tokens=1000"],
        ["task=predict", "task.inputs=cat.jpg", "task.stage=1", "task.max_new_tokens=64", "model.language.max_positions=9"],
    ],
)
def test_the_ends_of_a_range_are_allowed(overrides):
    compose_config(overrides)


@pytest.mark.parametrize("task", ["caption", "retrieval", "vqa_finetune"])
def test_an_evaluation_has_no_training_to_go_on_with(task, tmp_path):
    words = [f"task={task}", f"resume={tmp_path}"]
    with pytest.raises(UserError, match=rf"resume=.*: task={task} with task.train=false trains nothing; resume=auto"):
        compose_config([*words, "task.train=false"])
    assert compose_config([*words, "task.train=true"]).resume == str(tmp_path)
