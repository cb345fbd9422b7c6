"""What the work of a step is counted as, and how it is shown, without doing it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from blip2x.config.check_task import BENCHMARKS
from blip2x.config.compose import compose_config
from blip2x.data.samples import QuestionSample
from blip2x.models.flops import training_flops
from blip2x.parallel.context import Context
from blip2x.tasks.benchmarking import work
from blip2x.tasks.benchmarking.jobs import Job, job_of
from blip2x.tasks.benchmarking.measure import Spread, _amounts, _flops
from blip2x.tasks.benchmarking.tables import parts_table
from blip2x.tasks.retrieval import Search

RUN = SimpleNamespace(context=Context())
WORDS = ["model.qformer.vocab_size=50", "model.language.vocab_size=60"]


def job(name: str, *overrides: str) -> Job:
    task = compose_config(["task=benchmark"]).task
    task.overrides = list(overrides)
    return job_of(task, name)


def step_of(job: Job, *, encodes: bool = True) -> SimpleNamespace:
    """What a step of `job` looks like to those who count it."""
    sizes = {"images": job.images(1), "texts": 3, "text_tokens": 4, "output_tokens": 0, "pairs": 6}
    return SimpleNamespace(job=job, run=RUN, encodes=encodes, **sizes)


def flops_of(work: SimpleNamespace) -> dict[str, float]:
    return _flops(work, _amounts(work), 50)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_kept_outputs_of_the_image_encoder_spare_its_operations_alone(name):
    one = job(name, *WORDS)
    seen, kept = (flops_of(step_of(one, encodes=encodes)) for encodes in (True, False))
    assert seen["vision"] > 0 and kept == {**seen, "vision": 0}


def test_cached_contrast_counts_the_pairs_of_all_micro_batches():
    one = job("pretrain_stage1", *WORDS, "task.accumulate=4", "task.cached_contrast=true")
    work = step_of(one)
    micro = training_flops(one.cfg.model, "pretrain_stage1", _amounts(work), data_ranks=4)
    assert flops_of(work) == {part: 4 * count for part, count in micro.items()}


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["task.num_beams=3"], 3),
        (["task.num_beams=3", "task.num_return_sequences=2"], 3),
        (["task.num_beams=1", "task.do_sample=true", "task.num_return_sequences=7"], 7),
    ],
)
def test_texts_that_are_drawn_count_as_beams_do(overrides, rows):
    one = job("caption", *overrides)
    found = _amounts(step_of(one))
    assert (found.beams, found.images, found.texts) == (rows, one.images(1), 3)


@pytest.mark.parametrize(("clean", "read"), [(False, "Q: What IS it?  A:"), (True, "Q: what is it? A:")])
def test_questions_are_counted_as_they_are_asked(monkeypatch, clean, read):
    question = QuestionSample(0, None, "What IS it? ", (), "", "", 0)
    monkeypatch.setattr(work, "made_up_questions", lambda job, count: [question])
    prompts = []

    def encode(texts, **_):
        prompts.extend(texts)
        return np.zeros((1, 5), np.int64), np.ones((1, 5), np.int64)

    layers = SimpleNamespace(vision=None, language=None, qformer=None)
    words = [f"task.clean_questions={str(clean).lower()}", "task.prompt='Q: {} A:'"]
    asking = work.Asking(job("vqa_zeroshot", *words), RUN, layers, SimpleNamespace(family="opt", encode=encode))
    assert prompts == [read] and asking.text_tokens == 5


def test_a_pair_that_a_batch_repeats_counts_once(monkeypatch):
    """Four texts; image 1 is another rank's."""
    monkeypatch.setattr(Search, "_match", lambda *_: None)
    search = object.__new__(work._Searched)
    search._match(SimpleNamespace(places=[0, 2]), np.arange(3), SimpleNamespace(texts=[""] * 4), np.array([0, 1, 4, 8, 9, 11]))
    assert search.pairs == 5


def test_a_part_that_the_table_does_not_know_stands_behind_the_others():
    seconds = {"odd": 1.0, "rest": 2.0, "data": 3.0}
    spreads = {name: Spread.of([value]) for name, value in seconds.items()}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(parts_table(SimpleNamespace(parts=seconds, part=spreads.get, step=Spread.of([6.0]))))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("data", "rest,", "odd")] == ["data", "rest,", "odd"]
