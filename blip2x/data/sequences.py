"""Samples as sequences that make each one when it is asked for: millions of them cost no memory.

N samples, E of an epoch.
"""

from __future__ import annotations

import bisect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from blip2x.data.pictures import PathImage
from blip2x.data.samples import CaptionSample, Picture, QuestionSample
from blip2x.data.shards import StoredImage
from blip2x.data.tables import TableFile
from blip2x.data.tokenize import clean_caption
from blip2x.errors import UserError

S = TypeVar("S", CaptionSample, QuestionSample)

_RELEASE_EVERY = 16  # rows: around each the system maps what it has read ahead, up to several MB
_SHARDS_AT_ONCE = 16  # that samples are drawn from, so that disks read in runs


class Samples(Sequence[S], Generic[S]):
    """A sequence that knows the numbers of its images without making its samples.

    Attributes:
        left_out: samples of the whole split that it has not, since their images are missing, whatever is chosen of it.
    """

    left_out: int = 0

    @property
    @abstractmethod
    def image_id_N(self) -> np.ndarray:
        """int64 [N]."""

    @property
    def epoch_length(self) -> int:
        """How many samples an epoch of training takes, E."""
        return len(self)

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """Places of an epoch's samples [E], in the order drawn by lot; place + N is a second draw of the same sample."""
        return shuffled(len(self), rng)

    def first_images(self, limit: int | None) -> Samples[S]:
        """The samples of the first `limit` different images; None: all."""
        if limit is None:
            return self
        ids_N = self.image_id_N
        _, first = np.unique(ids_N, return_index=True)
        kept = ids_N[np.sort(first)[:limit]]
        return Chosen(self, np.flatnonzero(np.isin(ids_N, kept)), left_out=self.left_out)

    @abstractmethod
    def sample(self, place: int) -> S:
        """The one at a place from 0 to N - 1."""

    def __getitem__(self, index: int | slice) -> S | Samples[S]:
        if isinstance(index, slice):
            return Chosen(self, np.arange(*index.indices(len(self))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        return self.sample(place)

    def __iter__(self) -> Iterator[S]:
        return map(self.sample, range(len(self)))


class Table(Samples[S]):
    """The rows of a memory-mapped table as samples."""

    def __init__(self, file: TableFile, images: Path, max_pixels: int):
        table = file.table
        self._columns = {name: table[name].chunk(0) for name in table.column_names}
        self._file, self._count, self._images, self._max_pixels = file, len(table), images, max_pixels
        self._looked_at = 0

    def sample(self, place: int) -> S:
        """The row at that place."""
        self._looked_at += 1
        if self._looked_at % _RELEASE_EVERY == 0:
            self._file.release()
        return self._row(place)

    @abstractmethod
    def _row(self, row: int) -> S:
        """A sample made of a row."""

    def __len__(self) -> int:
        return self._count

    @property
    def image_id_N(self) -> np.ndarray:
        """int64 [N]."""
        return self._columns["image_id"].to_numpy()

    def _value(self, name: str, row: int):
        return self._columns[name][row].as_py()

    def _picture(self, row: int) -> Picture:
        image = self._value("image", row)
        stored = self._value("file", row) if "file" in self._columns else None
        if stored is None:
            return PathImage(self._images / image, self._max_pixels)
        offset, length = self._value("offset", row), self._value("length", row)
        return StoredImage(self._images / stored, offset, length, str(self._images / image), self._max_pixels)


class CaptionTable(Table[CaptionSample]):
    """One sample per image; with `clean`, captions are prepared for training."""

    def __init__(self, file: TableFile, images: Path, max_pixels: int, *, clean: bool):
        super().__init__(file, images, max_pixels)
        self._clean = clean

    def _row(self, row: int) -> CaptionSample:
        captions = self._value("captions", row)
        if self._clean:
            captions = list(filter(None, map(clean_caption, captions)))
            if not captions:
                raise UserError(f"image {self._picture(row).name} has no caption but punctuation")
        unique = tuple(dict.fromkeys(captions))
        return CaptionSample(self._picture(row), unique, self._value("image_id", row), self._value("group", row))

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """Where images lie in shards: some shards at a time are mixed, and the shards' own order is drawn by lot."""
        file = self._columns["file"]
        if file.null_count:
            return shuffled(len(self), rng)
        codes = file.dictionary_encode().indices.to_numpy()
        starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1, [len(codes)]])
        shards = rng.permutation(len(starts) - 1)
        groups = []
        for first in range(0, len(shards), _SHARDS_AT_ONCE):
            chosen = shards[first : first + _SHARDS_AT_ONCE]
            places = np.concatenate([np.arange(starts[s], starts[s + 1], dtype=_dtype(len(self))) for s in chosen])
            groups.append(rng.permutation(places))
        return np.concatenate(groups)


class QuestionTable(Table[QuestionSample]):
    """One sample per question."""

    def _row(self, row: int) -> QuestionSample:
        names = ("question_id", "question", "question_type", "answer_type", "image_id", "group")
        values = {name: self._value(name, row) for name in names}
        return QuestionSample(image=self._picture(row), answers=tuple(self._value("answers", row)), **values)

    @property
    def question_id_N(self) -> np.ndarray:
        """int64 [N]."""
        return self._columns["question_id"].to_numpy()


class Chosen(Samples[S]):
    """Some of the samples of another sequence."""

    def __init__(self, samples: Samples[S], places: np.ndarray, *, left_out: int = 0):
        self._samples, self._places, self.left_out = samples, places, left_out

    def __len__(self) -> int:
        return len(self._places)

    def sample(self, place: int) -> S:
        """The one chosen for that place."""
        return self._samples.sample(int(self._places[place]))

    @property
    def image_id_N(self) -> np.ndarray:
        """int64 [N]."""
        return self._samples.image_id_N[self._places]

    @property
    def question_id_N(self) -> np.ndarray:
        """int64 [N]."""
        return self._samples.question_id_N[self._places]

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """The order of the whole, without what was not chosen."""
        place = np.full(len(self._samples), -1, dtype=np.int64)
        place[self._places] = np.arange(len(self))
        order = place[self._samples.epoch_order(rng)]
        return order[order >= 0].astype(_dtype(len(self)))


class Mixture(Samples[S]):
    """Several sequences, one after the other; in training each sample of a part is taken `weight` times per epoch.

    Parts number their images independently: `apart` is added once per part, which keeps the numbers apart and those of the
    first part as they are. Questions are numbered anew where parts use the same numbers.
    """

    def __init__(self, parts: Sequence[Samples[S]], weights: Sequence[float], *, apart: int):
        self._parts, self._weights, self._apart = parts, weights, apart
        self.left_out = sum(part.left_out for part in parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        questions = [part.question_id_N for part in parts if hasattr(part, "question_id_N")]
        self._renumber = bool(questions) and len(np.unique(np.concatenate(questions))) < self._ends[-1]

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, place: int) -> S:
        """That of a part, under the whole's numbers."""
        part = bisect.bisect_right(self._ends, place)
        sample = self._parts[part].sample(place - self._start(part))
        changes = {"image_id": sample.image_id + part * self._apart} if part else {}
        changes |= {"question_id": place} if self._renumber else {}
        return replace(sample, **changes) if changes else sample

    @property
    def image_id_N(self) -> np.ndarray:
        """int64 [N]."""
        return np.concatenate([part.image_id_N + index * self._apart for index, part in enumerate(self._parts)])

    @property
    def epoch_length(self) -> int:
        """That of the parts, each as often as its weight says."""
        return sum(map(self._wanted, range(len(self._parts))))

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """The parts' own orders, each as often as its weight says, interleaved by lot."""
        if len(self._parts) == 1 and self._weights[0] == 1:
            return self._parts[0].epoch_order(rng)
        dtype = _dtype(round(sum(self._weights) + 1) * len(self))
        orders = [self._part_order(part, rng, dtype) for part in range(len(self._parts))]
        labels = np.repeat(np.arange(len(orders), dtype=np.min_scalar_type(len(orders))), [len(order) for order in orders])
        rng.shuffle(labels)
        mixed = np.empty(len(labels), dtype=dtype)
        for part, order in enumerate(orders):
            mixed[labels == part] = order
        return mixed

    def _part_order(self, part: int, rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
        """Whole rounds over the part, then a share of one."""
        count, wanted, orders = len(self._parts[part]), self._wanted(part), []
        for copy in range(-(-wanted // count) if count else 0):
            order = self._parts[part].epoch_order(rng)[: wanted - copy * count]
            orders.append(order.astype(dtype) + dtype.type(self._start(part) + copy * len(self)))
        return np.concatenate(orders) if orders else np.array([], dtype=dtype)

    def _wanted(self, part: int) -> int:
        return round(self._weights[part] * len(self._parts[part]))

    def _start(self, part: int) -> int:
        return self._ends[part - 1] if part else 0


class Documents(Sequence[str]):
    """One document per image: its captions, a line each."""

    def __init__(self, samples: Samples[CaptionSample]):
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> str:
        return "\n".join(self._samples[index].captions)

    @property
    def epoch_length(self) -> int:
        """That of the images."""
        return self._samples.epoch_length

    def epoch_order(self, rng: np.random.Generator) -> np.ndarray:
        """That of the images."""
        return self._samples.epoch_order(rng)


def epoch_length(samples: Sequence) -> int:
    """How many samples an epoch of training takes; of a mixture's parts each as often as its weight says."""
    return samples.epoch_length if isinstance(samples, (Samples, Documents)) else len(samples)


def left_out(samples: Sequence) -> int:
    """How many samples a sequence has not, since their images are missing; 0 for a plain one."""
    return samples.left_out if isinstance(samples, Samples) else 0


def shuffled(count: int, rng: np.random.Generator) -> np.ndarray:
    """The numbers below `count` in an order drawn by lot, in as few bytes as hold them."""
    return rng.permutation(np.arange(count, dtype=_dtype(count)))


def _dtype(count: int) -> np.dtype:
    return np.dtype(np.uint32 if count <= np.iinfo(np.uint32).max else np.int64)
