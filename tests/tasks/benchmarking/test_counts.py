"""What the work of a step is counted as, and how it is shown, without doing it."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from blip2x.config.compose import compose_config
from blip2x.data.samples import QuestionSample
from blip2x.parallel.context import Context
from blip2x.tasks.benchmarking import work
from blip2x.tasks.benchmarking.jobs import Job, job_of
from blip2x.tasks.benchmarking.measure import Spread, _amounts
from blip2x.tasks.benchmarking.tables import parts_table
from blip2x.tasks.retrieval import Search

RUN = SimpleNamespace(context=Context())


def job(name: str, *overrides: str) -> Job:
    task = compose_config(["task=benchmark"]).task
    task.overrides = list(overrides)
    return job_of(task, name)


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["task.num_beams=3"], 3),
        (["task.num_beams=3", "task.num_return_sequences=2"], 3),
        (["task.num_beams=1", "task.do_sample=true", "task.num_return_sequences=7"], 7),
    ],
)
def test_texts_that_are_drawn_count_as_beams_do(overrides, rows):
    own = {"images": 2, "encodes": True, "texts": 2, "text_tokens": 4, "output_tokens": 0}
    found = _amounts(SimpleNamespace(job=job("caption", *overrides), run=RUN, **own))
    assert (found.beams, found.images, found.texts) == (rows, 2, 2)


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
