"""Millions of samples as sequences: numbers, order by lot, weights, shards."""

from __future__ import annotations

import mmap
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blip2x.config.dataset import OnBadImage
from blip2x.data.loader import build_loader
from blip2x.data.sequences import CaptionTable, Chosen, Documents, Mixture, QuestionTable, epoch_length, left_out, shuffled
from blip2x.data.tables import CAPTIONS, QUESTIONS, TableFile


def in_memory(columns: dict, schema: pa.Schema) -> TableFile:
    return TableFile(Path("no file"), pa.table(columns, schema=schema), mmap.mmap(-1, 1))


def captions(count: int, shards: int = 0) -> CaptionTable:
    columns = {
        "image": [f"{i}.jpg" for i in range(count)],
        "captions": [[f"Caption {i}!", "the other"] for i in range(count)],
        "image_id": list(range(100, 100 + count)),
        "group": [""] * count,
        "file": [f"{i * shards // count}.tar" if shards else None for i in range(count)],
        "offset": list(range(count)),
        "length": [1] * count,
    }
    return CaptionTable(in_memory(columns, CAPTIONS), Path("images"), 10**8, clean=True)


def questions(ids: list[int]) -> QuestionTable:
    columns = {
        "image": ["1.jpg"] * len(ids),
        "question": [f"q{i}?" for i in ids],
        "answers": [["x"]] * len(ids),
        "question_id": ids,
        "question_type": ["q"] * len(ids),
        "answer_type": ["other"] * len(ids),
        "image_id": [i // 10 for i in ids],
        "group": [""] * len(ids),
    }
    return QuestionTable(in_memory(columns, QUESTIONS), Path("images"), 10**8)


def test_places_from_both_ends_and_slices():
    samples = captions(5)
    assert samples[-1] == samples[4] and samples[4].captions == ("caption 4", "the other")
    assert [sample.image_id for sample in samples[1:3]] == [101, 102] == samples[1:3].image_id_N.tolist()
    with pytest.raises(IndexError):
        _ = samples[5]
    assert Documents(samples)[0] == "caption 0\nthe other" and len(list(Documents(samples))) == 5


def test_an_epoch_of_one_table_is_a_permutation_as_of_a_list():
    rng = [np.random.default_rng([3, 7]) for _ in range(2)]
    order = captions(50).epoch_order(rng[0])
    assert order.tolist() == rng[1].permutation(50).tolist()
    assert Mixture([captions(50)], [1.0], apart=1).epoch_order(np.random.default_rng([3, 7])).tolist() == order.tolist()
    assert shuffled(10, np.random.default_rng(0)).dtype == np.uint32


@pytest.mark.parametrize(("weights", "taken"), [((1.0, 1.0), (40, 20)), ((0.5, 2.5), (20, 50)), ((3.0, 0.01), (120, 0))])
def test_parts_are_taken_as_often_as_their_weights_say(weights, taken):
    mixture = Mixture([captions(40), captions(20)], weights, apart=1000)
    orders = [mixture.epoch_order(np.random.default_rng([0, epoch])) for epoch in range(3)]
    for order in orders:
        assert len(order) == len(set(order.tolist())) == sum(taken) == epoch_length(mixture)
        assert len(order) == epoch_length(Documents(mixture))
        parts = Counter((place % 60) // 40 for place in order.tolist())
        assert (parts[0], parts[1]) == taken
        most = max(Counter(place % 60 for place in order.tolist()).values())
        assert most == max(-(-t // n) for t, n in zip(taken, (40, 20), strict=True))  # as evenly as possible
    assert len({tuple(order.tolist()) for order in orders}) == 3
    if weights[0] == 0.5:  # other halves in other epochs
        assert len({frozenset(p for p in order.tolist() if p % 60 < 40) for order in orders}) == 3


def test_parts_are_mixed_all_along():
    order = Mixture([captions(500), captions(500)], (1.0, 1.0), apart=1000).epoch_order(np.random.default_rng(0))
    for start in range(0, 1000, 100):
        assert 25 < int((order[start : start + 100] < 500).sum()) < 75


def test_shards_are_read_in_runs_and_mixed_with_their_neighbours():
    samples = captions(1000, shards=100)
    order = samples.epoch_order(np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(1000)) and epoch_length(samples) == 1000
    shard = order // 10
    for start in range(0, 960, 160):  # 16 shards of 10 at a time, and nothing of the others
        assert len(set(shard[start : start + 160].tolist())) == 16
        assert len(set(shard[start : start + 40].tolist())) > 8
    assert len(set(shard[:160].tolist()) & set(range(16))) < 16  # other ones each time
    some = Chosen(samples, np.arange(0, 1000, 2)).epoch_order(np.random.default_rng(0))
    assert sorted(some.tolist()) == list(range(500)) and len(set((some[:80] * 2 // 10).tolist())) == 16


def test_numbers_of_parts_are_kept_apart():
    mixture = Mixture([captions(3), captions(2)], (1.0, 1.0), apart=1000)
    assert [sample.image_id for sample in mixture] == [100, 101, 102, 1100, 1101] == mixture.image_id_N.tolist()
    kept = Mixture([questions([10, 11]), questions([20])], (1.0, 1.0), apart=1000)
    assert [sample.question_id for sample in kept] == [10, 11, 20]
    clash = Mixture([questions([10, 11]), questions([10])], (1.0, 1.0), apart=1000)
    assert [sample.question_id for sample in clash] == [0, 1, 2]
    assert [sample.image_id for sample in kept.first_images(1)] == [1, 1] and kept.first_images(None) is kept


class Take:
    """A collate that tells which sample was taken, and the lot that was drawn for it."""

    def load(self, sample, rng):
        return sample.image_id, rng.random()

    def __call__(self, items):
        return {"image_id_B": np.array([i for i, _ in items]), "lot_B": np.array([lot for _, lot in items])}


def loader(samples, **ranks):
    return build_loader(
        samples,
        Take(),
        batch_size=4,
        shuffle=True,
        seed=1,
        num_workers=0,
        on_bad_image=OnBadImage.stop,
        drop_last=True,
        **ranks,
    )


@pytest.mark.parametrize(
    "samples", [captions(60, shards=30), Mixture([captions(20), captions(20, shards=5)], (0.5, 2.0), apart=1000)]
)
def test_training_goes_on_exactly_from_any_batch(samples):
    whole = loader(samples)
    whole.set_epoch(3)
    batches = [(batch["image_id_B"].tolist(), batch["lot_B"].tolist(), whole.samples) for batch in whole]
    assert len(batches) == len(whole)
    for first in (1, 7, len(batches)):
        rest = loader(samples)
        rest.set_epoch(3, first)
        assert [(b["image_id_B"].tolist(), b["lot_B"].tolist(), rest.samples) for b in rest] == batches[first:]


def test_ranks_share_an_epoch():
    samples = captions(48, shards=6)
    seen = []
    for rank in range(3):
        part = loader(samples, rank=rank, world_size=3)
        seen += [i for batch in part for i in batch["image_id_B"].tolist()]
    assert sorted(seen) == list(range(100, 148))


def test_a_sample_that_is_taken_twice_has_another_crop_and_caption():
    batches = list(loader(Mixture([captions(8)], (2.0,), apart=1)))
    lots: dict[int, set[float]] = {}
    for batch in batches:
        for image, lot in zip(batch["image_id_B"].tolist(), batch["lot_B"].tolist(), strict=True):
            lots.setdefault(image, set()).add(lot)
    assert len(lots) == 8 and all(len(drawn) == 2 for drawn in lots.values())


def test_what_is_left_out_of_a_split_is_counted_through_mixtures_and_limits():
    parts = [Chosen(questions([1, 2, 3]), np.array([0]), left_out=2), Chosen(questions([7, 8]), np.array([1]), left_out=1)]
    mixture = Mixture(parts, (1.0, 1.0), apart=1000)
    assert left_out(mixture) == left_out(mixture.first_images(None)) == left_out(mixture.first_images(1)) == 3
    assert left_out(questions([1])) == left_out([]) == 0
