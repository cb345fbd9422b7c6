"""What operations on data cost as data grow: each makes data of a size, and takes the time of the operation alone.

Each is one that a run does once, or once per epoch, with all of its samples. Their exponents (seconds ~ size ** exponent)
should be near 1: sorting adds a logarithm, and what is small has fixed costs, which make the exponent smaller.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console

from blip2x.config.dataset import AnnotationFiles
from blip2x.data.formats.entries import Entries
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.sequences import CaptionTable, Mixture
from blip2x.data.tables import caption_table
from blip2x.engine.loggers import Loggers
from blip2x.engine.report import write_report
from blip2x.engine.run import Run
from blip2x.metrics.bootstrap import resampled_means
from blip2x.metrics.cider import cider_scores
from blip2x.metrics.retrieval import Shortlists, hardest_pairs
from blip2x.metrics.vqa import answer_scores, majority_answers
from blip2x.parallel.context import Context
from blip2x.tasks.common.answering import by_image
from blip2x.tasks.common.merge import gather_array, gather_rows
from blip2x.tasks.common.retrieval import hits

_WORDS = 500  # that texts are made of
_CAPTIONS = 5  # per image
_PER_IMAGE = 5  # questions
_SHORT = 16  # candidates on a shortlist
_MOST_PIXELS = 1 << 20


def _opening(size: int) -> float:
    """An annotation file of as many images, for the first time."""
    with _annotations(size) as (reader, folder):
        return _seconds(lambda: caption_table(reader, folder, _quiet))


def _opening_again(size: int) -> float:
    """The same file when there is a table of it."""
    with _annotations(size) as (reader, folder):
        caption_table(reader, folder, _quiet)
        return _seconds(lambda: caption_table(reader, folder, _quiet))


def _reading(size: int) -> float:
    """Every sample of as many images, in the order of an epoch."""
    with _samples(size) as samples:
        order = samples.epoch_order(np.random.default_rng(0)).tolist()
        return _seconds(lambda: [samples[place] for place in order])


def _ordering(size: int) -> float:
    """An epoch's order over two parts of as many images, one of which is taken half."""
    with _samples(size) as samples:
        mixture = Mixture([samples, samples], [1.0, 0.5], apart=10**12)
        return _seconds(lambda: mixture.epoch_order(np.random.default_rng(0)))


def _grouping(size: int) -> float:
    """As many questions, by image."""
    questions = _questions(size)
    return _seconds(lambda: by_image(questions))


def _merging(size: int) -> float:
    """Rows of as many samples from one rank, put in order."""
    order = np.random.default_rng(0).permutation(size)
    rows = [(place, {"caption": "a photo"}) for place in order.tolist()]
    return _seconds(lambda: gather_rows(Context(), rows, np.arange(size)))


def _merging_arrays(size: int) -> float:
    """Vectors of as many samples, in blocks of 16."""
    order, blocks = np.random.default_rng(0).permutation(size), [np.zeros((16, 32), np.float32)] * (size // 16)
    blocks.append(np.zeros((size % 16, 32), np.float32))
    return _seconds(lambda: gather_array(Context(), order, blocks, np.arange(size)))


def _writing(size: int) -> float:
    """The file of as many predictions."""
    rows = _predictions(size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run(folder, folder, "vqa", Context(), Console(quiet=True), Loggers())
        return _seconds(lambda: run.write_predictions(rows))


def _reporting(size: int) -> float:
    """The page of a run that answered as many questions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "results.json").write_text(json.dumps({"vqa": {"accuracy": 50.0}}), encoding="utf-8")
        lines = "".join(json.dumps(row) + "\n" for row in _predictions(size))
        (folder / "predictions.jsonl").write_text(lines, encoding="utf-8")
        return _seconds(lambda: write_report(folder))


def _cider(size: int) -> float:
    """Captions of as many images, with five references each."""
    captions = _texts(6 * size)
    references = [captions[start : start + _CAPTIONS] for start in range(size, 6 * size, _CAPTIONS)]
    return _seconds(lambda: cider_scores(references, captions[:size]))


def _answers(size: int) -> float:
    """As many answers, each against ten."""
    told, given = _texts(size, 2), _texts(10 * size, 2)
    truth = {number: given[10 * number : 10 * number + 10] for number in range(size)}
    return _seconds(lambda: answer_scores(dict(enumerate(told)), truth))


def _commonest(size: int) -> float:
    """The commonest answers of as many questions, of as many types as VQAv2 has."""
    questions = _questions(size)
    return _seconds(lambda: majority_answers(questions, questions))


def _intervals(size: int) -> float:
    """Of one mean over as many values, five of each image."""
    values, images = np.random.default_rng(0).random(size), np.arange(size) // _PER_IMAGE
    return _seconds(lambda: resampled_means(values, images, [range(size)]))


def _ranking(size: int) -> float:
    """As many pairs of an image and a text, by similarity: shortlists both ways, and recalls."""
    similarity_NM, samples, owner_M = _search(size)

    def rank() -> None:
        Shortlists.of(similarity_NM, _SHORT).pairs()
        hits(similarity_NM.__getitem__, similarity_NM.T.__getitem__, samples, owner_M)

    return _seconds(rank)


def _reranking(size: int) -> float:
    """The same, where the shortlists' pairs have scores."""
    similarity_NM, samples, owner_M = _search(size)
    lists = Shortlists.of(similarity_NM, _SHORT)
    pair_K = lists.pairs()

    def rank() -> None:
        texts, images = lists.rerank(pair_K, np.zeros(len(pair_K), np.float32))
        hits(texts.row, images.row, samples, owner_M)

    return _seconds(rank)


def _hardest(size: int) -> float:
    """The hardest of as many pairs."""
    similarity_NM, samples, _ = _search(size)
    return _seconds(lambda: hardest_pairs(similarity_NM, [sample.captions for sample in samples]))


GROWTHS: dict[str, Callable[[int], float]] = {  # name -> seconds of the operation at a size
    "opening annotations": _opening,
    "opening annotations again": _opening_again,
    "reading samples": _reading,
    "ordering an epoch": _ordering,
    "grouping questions": _grouping,
    "merging rows": _merging,
    "merging arrays": _merging_arrays,
    "writing predictions": _writing,
    "reporting": _reporting,
    "cider": _cider,
    "answers": _answers,
    "commonest answers": _commonest,
    "intervals": _intervals,
    "ranking pairs": _ranking,
    "re-ranking pairs": _reranking,
    "hardest pairs": _hardest,
}


@contextmanager
def _annotations(images: int) -> Iterator[tuple[Entries, Path]]:
    """A file of captions, and a folder for its table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        entries = [{"image": f"{place // 1000}/{place}.jpg", "caption": text} for place, text in enumerate(_texts(images))]
        (folder / "captions.json").write_text(json.dumps(entries), encoding="utf-8")
        yield Entries(AnnotationFiles(captions=str(folder / "captions.json")), folder), folder


@contextmanager
def _samples(images: int) -> Iterator[CaptionTable]:
    with _annotations(images) as (reader, folder):
        yield CaptionTable(caption_table(reader, folder, _quiet), folder, _MOST_PIXELS, clean=True)


def _questions(count: int) -> list[QuestionSample]:
    answers = _texts(count, 1)
    return [
        QuestionSample(place, None, "what?", (answer,), f"type {place % 65}", "other", place // _PER_IMAGE)
        for place, answer in enumerate(answers)
    ]


def _predictions(count: int) -> list[dict[str, object]]:
    return [
        {
            "stage": "vqa",
            "image_id": place // _PER_IMAGE,
            "question": "what is it?",
            "question_type": f"type {place % 65}",
            "answers": [text],
            "prediction": text,
            "correct": float(place % 2),
        }
        for place, text in enumerate(_texts(count, 1))
    ]


def _search(pairs: int) -> tuple[np.ndarray, list[CaptionSample], np.ndarray]:
    """Similarities [N, 5 N] of about as many pairs, the images, and the image of each text."""
    images = max(2, round((pairs / _CAPTIONS) ** 0.5))
    similarity_NM = np.random.default_rng(0).random((images, _CAPTIONS * images), dtype=np.float32)
    samples = [CaptionSample(None, tuple(f"{image} {text}" for text in range(_CAPTIONS)), image) for image in range(images)]
    return similarity_NM, samples, np.repeat(np.arange(images), _CAPTIONS)


def _texts(count: int, words: int = 10) -> list[str]:
    word = np.random.default_rng(0).integers(_WORDS, size=(count, words)).tolist()
    return [" ".join(map("w{}".format, row)) for row in word]


def _quiet(_: str) -> None:
    """Says nothing."""


def _seconds(operation: Callable[[], object]) -> float:
    start = time.perf_counter()
    operation()
    return time.perf_counter() - start
