"""The plan of a check-up: lines in the terminal, and two files."""

from __future__ import annotations

import functools
import json

import pytest

from blip2x.config.compose import compose_config
from blip2x.config.run import RunConfig
from blip2x.config.tools import PlannedOn
from blip2x.data.audit.verdicts import Verdict
from blip2x.models.memory.predict import Layout
from blip2x.models.plan import traffic
from blip2x.models.plan.assumptions import COUNTS, MACHINES
from blip2x.models.plan.estimate import estimate
from blip2x.parallel.degrees import Degrees
from blip2x.tasks.checkup.examined import Examined, Wanted
from blip2x.tasks.checkup.plan import SHOWN, check_plan, step_options, training_of

FEW = ["dataset.train_scenes=64", "dataset.test_scenes=12"]


@functools.cache
def composed(*words: str) -> RunConfig:
    return compose_config(list(words))


@pytest.fixture
def examine(run):
    """`examine(*words)` -> the task of these words."""

    def make(*words: str, ranks: int = 1) -> Examined:
        cfg = composed(*words)
        return Examined(cfg.task.kind, Wanted(cfg, list(words)), run, Layout.of(cfg, ranks))

    return make


def test_the_options_hold_the_machines():
    assert {one.value for one in PlannedOn} == set(MACHINES)


def test_a_plan_has_lines_and_files(examine, run):
    examined = examine("task=pretrain_stage1", "parallelism=dp", "task.batch_size=16", *FEW, ranks=4)
    found = check_plan(examined, PlannedOn.h100_80gb, 300)
    assert [line.verdict for line in found.lines] == [Verdict.fine]
    assert "parallelism=dp on 8, 64" in found.lines[0].found
    assert "nothing fits, or ranks have no samples, on 512" in found.lines[0].found
    assert "H100 80 GB, 64 samples per step" in found.shown[0]
    assert [line.split()[0] for line in found.shown[2:]] == [str(count) for count in SHOWN]
    page = run.path("pretrain_stage1", "plan.md").read_text()
    assert "- 32: `parallelism=dp`, `task.batch_size=2`, `task.accumulate=1`, `task.cached_contrast=false`" in page
    assert "## What is assumed" in page
    record = json.loads(run.path("pretrain_stage1", "plan.json").read_text())
    assert set(record["plan"]) == {str(count) for count in COUNTS}
    assert record["plan"]["512"] is None
    assert record["plan"]["8"]["hours"] == pytest.approx(300 * 64 / record["plan"]["8"]["samples_per_second"] / 3600)


def test_the_words_of_a_plan_are_of_the_training_that_it_is_of(examine):
    """More than one micro-batch is planned with cached contrast, one without, whichever the command has."""
    words = ("task.batch_size=16", "task.accumulate=4", "task.cached_contrast=true", *FEW)
    examined = examine("task=pretrain_stage1", *words)
    training, layout = training_of(examined, None), traffic.Layout(Degrees(1, 1))
    for accumulate, cached in ((1, False), (4, True)):
        found = estimate(training, MACHINES["a100_40gb"], layout, accumulate, memory=False)
        task = compose_config(["task=pretrain_stage1", *FEW, *step_options(training, found)]).task
        assert (task.batch_size * task.accumulate, task.accumulate, task.cached_contrast) == (64, accumulate, cached)


def test_with_kept_features_it_is_of_later_epochs(examine, run):
    plain, kept = ("task=pretrain_stage2", *FEW), ("task=pretrain_stage2", "dataset.cache=features", *FEW)
    found = [check_plan(examine(*words), PlannedOn.a100_40gb, None) for words in (plain, kept)]
    assert ["later epochs" in one.shown[0] for one in found] == [False, True]
    one, other = (one.record["plan"]["gpus"]["1"] for one in found)
    assert other["forward"] < one["forward"] and other["cores"] == 0 < one["cores"]
    assert "later epochs" in run.path("pretrain_stage2", "plan.md").read_text()


@pytest.mark.parametrize(
    "words", [("task=pretrain_vision",), ("task=pretrain_language", "model=tiny_t5"), ("task=vqa_finetune",)]
)
def test_every_training_has_one(examine, words):
    found = check_plan(examine(*words, *FEW), PlannedOn.a100_40gb, None)
    assert [line.verdict for line in found.lines] == [Verdict.fine]


def test_texts_that_are_missing_are_left_to_the_memorys_check(examine):
    words = ["task=pretrain_stage2", "dataset=coco", "model=opt2.7b", "model.language.vocab_size=null"]
    assert not check_plan(examine(*words), PlannedOn.a100_40gb, None).lines
