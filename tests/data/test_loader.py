import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from blip2x.config.dataset import OnBadImage
from blip2x.data.loader import build_loader
from blip2x.errors import UserError


@dataclass
class Numbers:
    """Loads sample i as (i, a random number); the samples in `bad` cannot be loaded."""

    bad: set = field(default_factory=set)

    def load(self, sample, rng):
        if sample in self.bad:
            raise UserError(f"image {sample} is bad")
        return sample, rng.random()

    def __call__(self, items):
        return {"index_B": np.array([i for i, _ in items]), "chance_B": np.array([c for _, c in items])}


def loader(count=10, bad=(), **options):
    settings = {"batch_size": 3, "shuffle": True, "seed": 0, "num_workers": 0, "on_bad_image": OnBadImage.stop, **options}
    return build_loader(range(count), Numbers(set(bad)), **settings)


def indexes(batches):
    return [batch["index_B"].tolist() for batch in batches]


def flat(lists):
    return [index for one in lists for index in one]


def test_without_shuffling_samples_come_in_order():
    made = loader(shuffle=False)
    assert indexes(made) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]] and len(made) == 4


def test_epochs_differ_and_repeat():
    made = loader()
    first, again = indexes(made), indexes(made)
    made.set_epoch(1)
    second = indexes(made)
    assert first == again != second
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(10))
    assert indexes(loader(seed=1)) != first


def test_random_choices_follow_from_seed_epoch_and_sample():
    def choices(epoch, **options):
        made = loader(**options)
        made.set_epoch(epoch)
        return {int(i): c for batch in made for i, c in zip(batch["index_B"], batch["chance_B"], strict=True)}

    assert choices(0) == choices(0, batch_size=5) == choices(0, shuffle=False)
    assert set(choices(0).values()).isdisjoint(choices(1).values())
    assert set(choices(0).values()).isdisjoint(choices(0, seed=1).values())


class Repeated(Sequence):
    """Four samples, each of them three times in an epoch."""

    def __len__(self):
        return 4

    def __getitem__(self, place):
        return range(4)[place]

    def epoch_order(self, rng):
        return rng.permutation(12)


class Turns(Numbers):
    """Gives the turn in the place of a random number."""

    def load(self, sample, rng):
        return sample, rng.turn


def test_a_sample_that_comes_several_times_in_an_epoch_has_another_turn_each_time():
    settings = {"batch_size": 4, "shuffle": True, "seed": 0, "num_workers": 0, "on_bad_image": OnBadImage.stop}
    made = build_loader(Repeated(), Turns(), **settings)
    made.set_epoch(5)
    found = {(index, turn) for batch in made for index, turn in zip(*map(np.ndarray.tolist, batch.values()), strict=True)}
    assert found == {(index, turn) for index in range(4) for turn in (5, 6, 7)}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(workers):
    alone, helped = loader(), loader(num_workers=workers)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        for one, other in zip(alone, helped, strict=True):
            assert isinstance(other["index_B"], np.ndarray)
            assert np.array_equal(one["index_B"], other["index_B"]) and np.array_equal(one["chance_B"], other["chance_B"])


def test_ranks_share_the_samples_and_do_the_same_number_of_steps():
    ranks = [loader(count=11, rank=rank, world_size=2, drop_last=True, batch_size=2) for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [2, 2]
    seen = [flat(indexes(rank)) for rank in ranks]
    assert len(seen[0]) == len(seen[1]) == 4 and not set(seen[0]) & set(seen[1])
    parts = [flat(indexes(loader(count=11, rank=rank, world_size=2))) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(11))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_stops_with_its_name(workers):
    with pytest.raises(UserError, match=r"^image 4 is bad \(dataset.on_bad_image=skip leaves such images out\)$"):
        indexes(loader(bad=[4], shuffle=False, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_in_evaluation_leaves_gaps(workers):
    made = loader(bad=[1, 3, 4, 5], shuffle=False, on_bad_image=OnBadImage.skip, num_workers=workers)
    assert indexes(made) == [[0, 2], [6, 7, 8], [9]]
    assert made.skipped == [f"image {i} is bad" for i in (1, 3, 4, 5)]
    indexes(made)
    assert len(made.skipped) == 4  # counted once


def test_skipping_in_training_fills_the_gap():
    made = loader(bad=[1, 3, 4], on_bad_image=OnBadImage.skip)
    assert [len(batch) for batch in indexes(made)] == [3, 3, 3, 1]
    assert sorted(flat(indexes(made))) == [0, 2, 2, 5, 5, 5, 6, 7, 8, 9]
    assert sorted(made.skipped) == [f"image {i} is bad" for i in (1, 3, 4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_images_stop_in_training(workers):
    with pytest.raises(UserError, match=r"^100 images in a row are bad; the last: image \d is bad$"):
        indexes(loader(bad=range(10), on_bad_image=OnBadImage.skip, num_workers=workers))


class Slow(Numbers):
    """Pictures of which each takes 20 ms."""

    def load(self, sample, rng):
        time.sleep(0.02)
        return super().load(sample, rng)

    def __call__(self, items):
        return {"image_BCHW": np.zeros((len(items), 1)), **super().__call__(items)}


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_and_the_time_of_all_workers_are_counted(workers):
    made = build_loader(
        range(10), Slow({4}), batch_size=3, shuffle=False, seed=0, num_workers=workers, on_bad_image=OnBadImage.skip
    )
    assert (made.images, made.loading_seconds) == (0, 0)
    for rounds in (1, 2):
        list(made)
        assert made.images == 9 * rounds and made.loading_seconds >= 0.2 * rounds


def test_nothing_to_load_is_refused():
    with pytest.raises(UserError, match="has no samples"):
        loader(count=0)
    with pytest.raises(UserError, match=r"10 samples do not fill one batch of 6 on 2 rank\(s\); lower task.batch_size"):
        loader(batch_size=6, world_size=2, drop_last=True)


def test_a_loop_may_end_early():
    made = loader(num_workers=1)
    assert next(iter(made))["index_B"].shape == (3,)
    assert len(indexes(made)) == 4


KILLED = """
import os, signal
from tests.data.test_loader import loader
batches = iter(loader(count=5000, num_workers=2))
next(batches)
print(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux ends processes with their parent")
def test_workers_end_with_a_main_process_that_is_killed():
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    workers = done.stdout.split()
    assert len(workers) == 2, done.stderr
    end = time.monotonic() + 10
    while any(Path("/proc", worker, "cmdline").exists() and Path("/proc", worker, "cmdline").read_text() for worker in workers):
        assert time.monotonic() < end, "a worker goes on alone"
        time.sleep(0.05)


def test_a_worker_that_begins_after_its_main_process_has_ended_ends_at_once():
    code = "from blip2x.data.loader import _stand_apart; _stand_apart(1 << 30, 0); print('goes on')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
