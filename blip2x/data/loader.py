"""Batches in an order that depends only on seed and epoch, whatever the number of worker processes.

Worker processes make NumPy arrays only: a paddle tensor made in one ends it with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypedDict

import numpy as np

from blip2x.config.dataset import OnBadImage
from blip2x.data.collate import Batch, Collate
from blip2x.data.sequences import shuffled
from blip2x.data.transforms import Lot
from blip2x.errors import UserError

_MOST_BAD_IN_A_ROW = 100
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class _Made(TypedDict):
    """A batch on its way out of a worker."""

    arrays: Batch  # empty where no sample could be loaded
    samples: (
        np.ndarray
    )  # their places in the data set; never empty: paddle's loader takes an item without any array for the end
    problems: list[str]
    give_up: bool
    seconds: float  # that making it took


class Completion(Protocol):
    """What becomes of batches in the process that asks for them; see `blip2x.tasks.common.features`."""

    def begin(self) -> None:
        """An iteration begins; worker processes start after this, and know what this one knows."""

    def complete(self, batch: Batch) -> dict[str, Any]:
        """The batch as it is given away."""


class Loader:
    """Iterable over batches, again and again; see `build_loader`.

    Attributes:
        skipped: one sentence per bad image that was left out so far, in the order in which they were met.
        samples: places in the data set of the samples in the batch that was given last.
        left_out: how many samples could not be loaded so far, also where several have the same bad image.
        images: how many pictures were opened for the batches that were given so far.
        loading_seconds: how long it took to make those batches; with several workers, the sum of their times.
    """

    def __init__(self, batches: _Batches, num_workers: int, completion: Completion | None):
        self._batches = batches
        self._num_workers = num_workers
        self._completion = completion
        self.skipped: list[str] = []
        self._known: set[str] = set()
        self.samples: list[int] = []
        self.left_out = 0
        self.images = 0
        self.loading_seconds = 0.0
        self._first = 0

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Order, crops and captions of the next iteration are those of `epoch`; it begins with batch `first`."""
        self._batches.epoch = epoch
        self._first = first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._completion is None:
            yield from self._arrays()
            return
        self._completion.begin()
        yield from map(self._completion.complete, self._arrays())

    def _arrays(self) -> Iterator[Batch]:
        for made in self._made():
            problems = made["problems"]
            if problems and self._batches.on_bad_image is OnBadImage.stop:
                raise UserError(f"{problems[0]} (dataset.on_bad_image=skip leaves such images out)")
            if made["give_up"]:
                raise UserError(f"{_MOST_BAD_IN_A_ROW} images in a row are bad; the last: {problems[-1]}")
            self.left_out += len(problems)
            self.images += len(made["arrays"].get("image_BCHW", ()))
            self.loading_seconds += made["seconds"]
            for problem in problems:
                if problem not in self._known:
                    self._known.add(problem)
                    self.skipped.append(problem)
            if made["arrays"]:
                self.samples = made["samples"].tolist()
                yield made["arrays"]

    def _made(self) -> Iterator[_Made]:
        wanted = range(self._first, len(self._batches))
        if self._num_workers == 0:
            yield from map(self._batches.__getitem__, wanted)
            return
        import paddle  # only worker processes need it

        # Each worker is two batches ahead (prefetch_factor by default). Workers start anew with each epoch, which takes a
        # fraction of a second: persistent ones would not see the next epoch's order, and Paddle takes 0.5 s to wake them.
        loader = paddle.io.DataLoader(
            _Rest(self._batches, wanted),
            places=paddle.CPUPlace(),
            batch_size=None,  # an item of the data set is a batch already
            collate_fn=_unchanged,
            num_workers=self._num_workers,
            worker_init_fn=partial(_stand_apart, os.getpid()),
        )
        before = np.random.get_state()
        made_by_workers = iter(loader)  # draws a seed for the workers, none of which uses it
        np.random.set_state(before)
        for made in made_by_workers:
            arrays = {key: value.numpy() for key, value in made["arrays"].items()}
            yield {**made, "arrays": arrays, "samples": made["samples"].numpy()}


class _Rest:
    """The batches at the places `wanted`, for worker processes."""

    def __init__(self, batches: _Batches, wanted: range):
        self.batches, self.wanted = batches, wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, item: int) -> _Made:
        return self.batches[self.wanted[item]]


class _Batches:
    """Batch i of the current epoch as item i, with the sentences about its bad images beside it."""

    def __init__(self, samples, collate, *, batch_size, shuffle, seed, rank, world_size, drop_last, on_bad_image):
        self.samples = samples
        self.collate = collate
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.on_bad_image = on_bad_image
        self.epoch = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, indexes): kept, or each batch would shuffle anew

    def __len__(self) -> int:
        count = len(self._epoch_order())
        if self.drop_last:
            return count // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, count, self.world_size)) // self.batch_size)

    def __getitem__(self, batch: int) -> _Made:
        started = time.perf_counter()
        problems: list[str] = []
        own = self._epoch_order()[self.rank :: self.world_size][batch * self.batch_size : (batch + 1) * self.batch_size]
        items, places, give_up = [], [], False
        for index in own:
            place, item = self._load(int(index), problems)
            if item is not None:
                items.append(item)
                places.append(place)
            elif self._fills_gaps:
                give_up = True
                break
        arrays = self.collate(items) if items else {}
        return {
            "arrays": arrays,
            "problems": problems,
            "give_up": give_up,
            "samples": np.array(places or [-1]),
            "seconds": time.perf_counter() - started,
        }

    @property
    def _fills_gaps(self) -> bool:
        return self.shuffle and self.on_bad_image is OnBadImage.skip

    def _epoch_order(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self._drawn_order() if self.shuffle else np.arange(len(self.samples)))
        return self._order[1]

    def _drawn_order(self) -> np.ndarray:
        """Of an epoch: a data set may have a way of its own to draw it, and take some samples more often than others."""
        rng = np.random.default_rng([self.seed, self.epoch])
        draw = getattr(self.samples, "epoch_order", None)
        return draw(rng) if draw else shuffled(len(self.samples), rng)

    def _load(self, index: int, problems: list[str]) -> tuple[int, Any]:
        """A place and the sample there; for a bad image the next good one in training, where ranks need batches of one size.

        Elsewhere a bad one is None. `index` is the place, plus the number of samples for each time that it came before in this
        epoch: then its caption is drawn anew, and it has another crop, of fixed ones the next.
        """
        for step in range(_MOST_BAD_IN_A_ROW if self._fills_gaps else 1):
            place = (index + step) % len(self.samples)
            lot = index + step if index >= len(self.samples) else place
            try:
                return place, self.collate.load(
                    self.samples[place], Lot.of(self.seed, self.epoch, lot, index // len(self.samples))
                )
            except UserError as error:
                problems.append(str(error))
        return index, None


def build_loader(
    samples: Sequence[Any],
    collate: Collate,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    num_workers: int,
    on_bad_image: OnBadImage,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    completion: Completion | None = None,
) -> Loader:
    """Batches of `samples` for one rank, as dicts of NumPy arrays.

    Args:
        samples: what the data set gave, all of it, the same on each rank.
        collate: opens and stacks samples.
        batch_size: samples per rank.
        shuffle: a new order each epoch, for training; with bad images skipped, the next good sample fills the gap. Without it
            samples come in order, and a batch with a skipped image is smaller.
        seed: order, crops and choice of captions follow from it, the epoch and the sample's index.
        num_workers: processes that open pictures; 0: this process.
        on_bad_image: what to do with a sample that cannot be loaded.
        rank: this rank takes the samples rank, rank + world_size, ...
        world_size: number of ranks.
        drop_last: leave out what does not fill a batch on every rank, so that all ranks do the same number of steps.
        completion: what batches go through in this process; None: nothing.

    Raises:
        UserError: there is no sample, or not one full batch where `drop_last` asks for it.
    """
    if not samples:
        raise UserError("there is nothing to load: the data set has no samples here")
    batches = _Batches(
        samples,
        collate,
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
        on_bad_image=on_bad_image,
    )
    if drop_last and not len(batches):
        ranks = f"one batch of {batch_size} on {world_size} rank(s)"
        raise UserError(f"{len(samples)} samples do not fill {ranks}; lower task.batch_size")
    return Loader(batches, num_workers, completion)


def _unchanged(batch: Any) -> Any:
    return batch


def _stand_apart(main: int, worker: int) -> None:
    """Leave signals to the main process, which needs its workers until its step is done: Ctrl-C and launchers signal a group.

    A worker ends with its main process, however that ends: left alone, it would wait for ever for someone to read its batches.
    """
    os.setsid()
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != main:  # it ended before this worker asked for that
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
