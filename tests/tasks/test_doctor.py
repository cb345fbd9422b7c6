"""What is looked at, what is said about it, and that nothing is needed or made for it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from blip2x.config.compose import compose_config
from blip2x.errors import UserError
from blip2x.models.memory.predict import Layout, Part, Prediction
from blip2x.tasks import doctor
from blip2x.tasks.common.launch import launch
from blip2x.tasks.doctor import Texts, amount, model_of, texts_of, trainings, verdict

FEW = ["dataset.train_scenes=16", "dataset.test_scenes=12"]


def looked_at(*words):
    return trainings(compose_config(["task=doctor", *words]).task)


def test_the_commands_words_go_to_the_task_that_is_looked_at():
    (cfg,) = looked_at("task.of=pretrain_stage1", "optim.lr=1e-3", "run_name=r", "model=tiny_t5").values()
    assert (cfg.task.kind, cfg.optim.lr, cfg.run_name, cfg.model.name) == ("pretrain_stage1", 1e-3, None, "tiny_t5")
    assert cfg.task.batch_size == 64 and cfg.task.max_txt_len == 18  # of conf/recipe/digits/pretrain_stage1.yaml


def test_overrides_are_the_tasks_own():
    words = "task.overrides=['task.batch_size=3','precision=bf16','parallelism=sharding2']"
    (cfg,) = looked_at("task.of=pretrain_stage1", words, "task.world_size=4").values()
    assert (cfg.task.batch_size, cfg.precision.name.value, cfg.parallelism.sharding_stage) == (3, "bf16", 2)


def test_an_experiment_brings_its_task():
    (name,) = looked_at("task.of=null", "task.overrides=['experiment=caption_coco_ft_opt2.7b']")
    assert name == "caption"


def test_a_pipelines_trainings_are_looked_at():
    assert list(looked_at("task.of=pipeline")) == ["pretrain_language", "pretrain_vision", "pretrain_stage1", "pretrain_stage2"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["task.of=vqa_zeroshot"], "task=vqa_zeroshot trains nothing"),
        (["task.of=caption"], r"set \"task.overrides=\['task.train=true'\]\""),
        (["task.of=doctor"], "task.of=doctor trains nothing"),
        (["task.of=stage1"], "unknown task 'stage1'"),
        (["task.world_size=0"], "task.world_size must be at least 1, got 0"),
        (["task.overrides=['task.batch_size=0']"], "task.batch_size must be at least 1"),
        (["task.overrides=['task.batchsize=1']"], "batchsize"),
    ],
)
def test_mistakes_are_named(words, named):
    with pytest.raises(UserError, match=named):
        looked_at(*words)


def test_degrees_have_to_make_the_ranks():
    (cfg,) = looked_at("task.of=pretrain_stage1", "task.overrides=['parallelism=tp2']").values()
    with pytest.raises(UserError, match=r"= 1 \* 1 \* 2 = 2, but 3 process"):
        Layout.of(cfg, 3)
    assert Layout.of(cfg, 4).degrees.dp == 2
    (cfg,) = looked_at("task.of=pretrain_stage1", "task.overrides=['parallelism=sharding3']").values()
    with pytest.raises(UserError, match=r"sharding_stage=3 with parallelism\.sharding=1"):
        Layout.of(cfg, 1)
    assert Layout.of(cfg, 4).sharding_stage == 3


def test_it_needs_no_weights_and_leaves_a_page(tmp_path):
    command = [
        "task=doctor",
        "task.of=pretrain_stage1",
        "model=opt2.7b",
        "dataset=coco",
        f"paths.outputs={tmp_path}",
        "run_name=r",
    ]
    results = launch(compose_config(command), command)
    record = json.loads((tmp_path / "r/memory.json").read_text())["pretrain_stage1"]
    assert results["pretrain_stage1"]["predicted_gib"] == pytest.approx(record["peak"] / 2**30, abs=1e-3)
    assert [part["name"] for part in record["parts"]] == ["vision", "ln_vision", "qformer", "heads"]
    page = (tmp_path / "r/memory.md").read_text()
    assert "| vision | 985,894,528 | 0 | float32 | 3.67 GiB |" in page and "GiB free on this machine" in page
    assert "100 samples per rank, texts of 32 tokens, 224 pixels, fp32, 1 rank" in page


def test_the_longest_texts_are_the_data_sets_where_its_words_are_the_vocabulary():
    stage1, *stage2 = (
        texts_of(next(iter(looked_at(*FEW, *words).values())))
        for words in (
            ["task.of=pretrain_stage1"],
            ["task.of=pretrain_stage2"],
            ["task.of=pretrain_stage2", "model=tiny_t5"],
            ["task.of=pretrain_stage2", "model=tiny_t5", "task.overrides=['task.prefix_split=true','task.prompt=a photo']"],
        )
    )
    assert stage1.length == 18 and stage1.vocab_sizes["qformer"] > 20  # every text is filled up
    opt, t5, split = stage2
    assert 5 < opt.length < 20 and opt.output_length == 0  # bos, a caption, its end
    assert (t5.length, t5.output_length) == (1, opt.length - 1)  # the end alone, a caption and its end
    assert split.length == min(20, 1 + 2 + opt.length - 3)


def test_without_a_data_set_texts_are_as_long_as_allowed():
    for model, split, expected in (("opt2.7b", False, (32, 0)), ("flant5xl", False, (7, 32)), ("flant5xl", True, (32, 32))):
        words = f"task.overrides=['task.prompt=a photo of','task.prefix_split={split}']"
        (cfg,) = looked_at("task.of=pretrain_stage2", f"model={model}", "dataset=coco", words).values()
        texts = texts_of(cfg)
        assert (texts.length, texts.output_length) == expected


def test_a_trained_part_cannot_be_split():
    (cfg,) = looked_at("task.of=pretrain_stage2", "model.language.frozen=false", "task.overrides=['parallelism=tp2']").values()
    with pytest.raises(UserError, match=r"model\.language\.frozen=false trains this one"):
        model_of(cfg, Layout.of(cfg, 2), {"qformer": 9, "language": 9}, {})


MIB = 2**20
PART = Part("qformer", 5, 5, ("float32",), 4 * MIB, 2 * MIB, 3 * MIB, 90 * MIB)
FOUND = Prediction((PART,), MIB, "qformer, forward", update=0, checkpoint=12, saving=8)


def test_the_verdict_has_both_numbers():
    assert verdict(FOUND, 2**30, "on gpu:0", on_cpu=False) == "It fits: 100.0 MiB needed by a rank, 1.00 GiB free on gpu:0."
    with_libraries = verdict(FOUND, 101 * MIB, "on this machine", on_cpu=True)
    assert with_libraries.startswith(
        f"It does not fit: {amount(FOUND.resident)} needed by a rank, 101.0 MiB free on this machine; lower"
    )


def test_a_wide_terminal_gets_a_table_and_a_file_plain_lines():
    shown = {}
    for terminal, width in ((True, 150), (True, 80), (False, 150)):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
        doctor._show(console, "title", FOUND, ["a sentence [with brackets]"])
        found = console.file.getvalue()
        assert "title" in found and "a sentence [with brackets]" in found
        shown.setdefault(terminal, found)
        assert ("──" in found) == (terminal and width == 150)
    assert "activations" in shown[True].splitlines()[2]
    line = "  qformer: parameters 5, trained 5, stored as float32, weights 4.0 MiB, gradients 2.0 MiB, optimizer 3.0 MiB"
    assert shown[False].splitlines()[1] == f"{line}, activations 90.0 MiB, in all 99.0 MiB"


def test_free_memory_is_what_the_machine_has():
    free, where = doctor.free_memory("cpu")
    assert 2**20 < free < 2**50 and where == "on this machine"


def test_texts_say_what_they_are():
    cfg = next(iter(looked_at("task.of=pretrain_stage1").values()))
    said = doctor.sentences(cfg, FOUND, Layout.of(cfg, 1), Texts(18, 0, {}))
    assert "Highest: 100.0 MiB of tensors, in this part and pass: qformer, forward." in said
