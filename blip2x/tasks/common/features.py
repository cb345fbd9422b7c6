"""The cache of a frozen image encoder's outputs (``dataset.cache=features``): its key, its filling, and its size.

A batch comes from the loader with the rows that were found on disk, and with pixels of the others. `Features.complete` has the
encoder make those, rounds them to float16 as the kept ones are, keeps them, and puts all in their order. So a model is given
the same numbers in the epoch that fills the cache as in all later ones.

B samples, F of them found, M that lack, P patches, D width of the image encoder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import paddle
from paddle import nn

from blip2x.config.dataset import Cache
from blip2x.config.model import VisionConfig
from blip2x.config.run import RunConfig
from blip2x.config.task import may_keep_features, weights_dtype
from blip2x.data import transforms
from blip2x.data.collate import Batch, Collate
from blip2x.data.feature_rows import StoredTransform
from blip2x.data.feature_store import DTYPE, FeatureStore, identity_of
from blip2x.data.sequences import Samples, epoch_length
from blip2x.data.transforms import Lot
from blip2x.engine.folders import existing_folder
from blip2x.engine.memory_table import amount
from blip2x.engine.run import Run
from blip2x.engine.steps import count_steps
from blip2x.errors import UserError
from blip2x.models.compact import compact_of
from blip2x.parallel.devices import started_processes

_WITHOUT_EFFECT = ("drop_path_rate", "frozen", "recompute", "weights")  # on what a frozen encoder gives
_LOOKED_AT = 200  # samples at least, to judge how much of the cache is there
_LOWER = "lower dataset.crops or model.vision.image_size, or set dataset.cache=none"

_opened: WeakKeyDictionary[nn.Layer, dict[str, _Opened]] = WeakKeyDictionary()  # encoder -> its stores by what they follow from
_hashes: WeakKeyDictionary[nn.Layer, str] = WeakKeyDictionary()  # hashing a large encoder takes seconds


@dataclass
class _Opened:
    """A store, and what was said or is to be said of it: a training and its validations share both."""

    store: FeatureStore
    expected: set[tuple[str, int, int]] = field(default_factory=set)
    broken: int = 0
    stopped: bool = False
    lacking: Callable[[], float] | None = None  # on the main rank: bytes that a training has yet to keep, while there is one
    crowded: bool = False  # it was said that these leave an evaluation no room
    encoded: int = 0  # pictures of this rank since the last report
    damaged: int = 0


class Features:
    """What is kept of one image encoder, for the loaders of a task.

    Args:
        cfg: the whole config.
        run: the task's run.
        encoder: frozen; it is called under the precision that is in force where a batch is asked for.
        spare: gives how many bytes of the cache's disk are left to a training's checkpoints; None: as they are.
    """

    def __init__(self, cfg: RunConfig, run: Run, encoder: nn.Layer, spare: Callable[[], float] | None = None):
        self._run, self._encoder = run, encoder
        manifest = _manifest(cfg, encoder)
        self.folder = Path(cfg.paths.cache) / "features" / identity_of(repr(manifest)).hex()
        limit = None if cfg.dataset.cache_gb is None else 1e9 * cfg.dataset.cache_gb
        opened, key = _opened.setdefault(encoder, {}), f"{self.folder.absolute()} {limit}"
        if key not in opened:
            opened[key] = _Opened(FeatureStore(self.folder, row_shape(cfg.model.vision), manifest, limit))
        self._said, self.store = opened[key], opened[key].store
        self._limit_bytes, self._reserved = limit, 0.0
        if spare:
            self.store.spare = spare

    @classmethod
    def of(cls, cfg: RunConfig, run: Run, model: nn.Layer, spare: Callable[[], float] | None = None) -> Features | None:
        """Of a model's image encoder; None: the config wants no cache, or the task trains the encoder or has none."""
        return cls(cfg, run, model.vision, spare) if keeps_features(cfg) else None

    def collate(self, collate: Collate) -> Collate:
        """The same with a transform that looks for rows before it opens pictures."""
        return replace(collate, transform=StoredTransform(collate.transform, self.store))

    def expect(
        self, samples: Sequence[Any], collate: Collate, crops: int, what: str, *, begins: bool, most: int | None = None
    ) -> None:
        """Say, the first time, how large the cache becomes by these samples' images with so many crops each.

        All ranks must call it, and again before each evaluation.

        Args:
            samples: all of them, the same on each rank.
            collate: as `collate` is given it.
            crops: of each image.
            what: the samples are, in a word.
            begins: the task's work, so that nothing is lost by refusing what does not fit. What an evaluation in or behind a
                training would keep is warned of instead, and kept as far as it fits beside what the training has yet to keep.
            most: rows that are kept at most, of a training that ends before it has read all; None: all.

        Raises:
            UserError: some of it lacks, and all of it is more than dataset.cache_gb, or what lacks than the disk has room for.
        """
        store, expected = self.store, (what, len(samples), crops)
        if not begins:
            self._reserved = self._run.context.on_main(lambda: self._said.lacking() if self._said.lacking else 0.0)
        if expected in self._said.expected:
            return
        self._said.expected.add(expected)

        def judge() -> None:
            images, transform = count_images(samples), StoredTransform(collate.transform, store)
            size, said = _extent(images, crops, most, store.shape)
            share, whole = self._lacking(samples, transform, crops), predicted_bytes(images * crops, store.shape)
            lacking = size * share
            if begins:  # it may read less than all, so that what has come since counts and not what lacks of all
                self._said.lacking = lambda: max(0.0, lacking - whole * (share - self._lacking(samples, transform, crops)))
            said += f", of which {'about ' if 0 < lacking < size else ''}{amount(lacking)} lack"
            text = f"features ({what}): {said}; {self.folder} has {len(store):,} rows ({amount(store.bytes)})"
            self._run.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
            problem = self._problem(size, lacking)
            if problem and begins:
                raise UserError(f"features ({what}): {said}; {problem}")
            problem = problem or self._beside(lacking)
            if problem:
                self._said.crowded |= not begins
                self._warn(f"{what}: {problem}")

        self._run.context.on_main(judge)

    def _lacking(self, samples: Sequence[Any], transform: StoredTransform, crops: int) -> float:
        """The share of rows that are not there, of some samples in equal distances."""
        self.store.refresh()
        lacking: list[bool] = []
        for place in range(0, len(samples), max(1, len(samples) // _LOOKED_AT)) if len(self.store) else ():
            try:
                picture = samples[place].image
                identities = [transform.identity(picture, Lot.of(0, crop, place)) for crop in range(crops)]
            except UserError:  # nothing will be kept of it
                continue
            lacking += [not self.store.knows(identity) for identity in identities]
        return sum(lacking) / len(lacking) if lacking else 1.0

    def _problem(self, size: float, lacking: float) -> str | None:
        """Why so many bytes cannot be kept, of which `lacking` are not there."""
        if not lacking:
            return None
        if self._limit_bytes is not None and size > self._limit_bytes:
            return _beyond(self._limit_bytes)
        free, spare = shutil.disk_usage(existing_folder(self.folder)).free, self.store.spare()
        if lacking + self._reserved > free - spare:
            training = f" and {amount(self._reserved)} to the training" if self._reserved else ""
            left = f"of which {amount(spare)} are left to checkpoints{training}"
            return (
                f"the disk of paths.cache has {amount(free)} free, {left}; make room, set paths.cache to another disk, {_LOWER}"
            )
        return None

    def _beside(self, lacking: float) -> str | None:
        """Why some of so many bytes will not be kept, though all would be were nothing else there."""
        beside = self.store.bytes + self._reserved
        if not lacking or self._limit_bytes is None or lacking + beside <= self._limit_bytes:
            return None
        training = f" and the {amount(self._reserved)} that the training has yet to keep" if self._reserved else ""
        return (
            f"with the {amount(self.store.bytes)} that are there{training}, that is more than "
            f"dataset.cache_gb={self._limit_bytes / 1e9:g}; what finds no room is encoded each time"
        )

    def begin(self) -> None:
        """See what other processes have written; the loader's workers start after this and know it, too."""
        self.store.refresh()
        broken, self._said.broken = self.store.broken - self._said.broken, self.store.broken
        if broken:
            self._warn(f"{broken:,} rows in {self.folder} are not whole and count as not there")

    @paddle.no_grad()
    def complete(self, batch: Batch) -> dict[str, Any]:
        """A batch of `stack_images` with ``encoded_BPD``, float32 on the device, in the place of all about its images.

        Raises:
            UserError: an output is beyond the range of float16.
        """
        rest = dict(batch)
        stored_FPD, place_F = rest.pop("stored_FPD", None), rest.pop("stored_F", ())
        image_MCHW, identity_MI, damaged_M = (rest.pop(name, ()) for name in ("image_BCHW", "identity_MI", "damaged_M"))
        if len(image_MCHW):
            encoded_BPD = np.empty((len(place_F) + len(image_MCHW), *self.store.shape), DTYPE)
            lacking = np.ones(len(encoded_BPD), dtype=bool)
            lacking[np.asarray(place_F, np.int64)] = False
            if len(place_F):
                encoded_BPD[place_F] = stored_FPD
            encoded_BPD[lacking] = self._rows(image_MCHW, identity_MI)
            self._said.damaged += int(damaged_M.sum())
        else:
            encoded_BPD = stored_FPD
        return {"encoded_BPD": paddle.to_tensor(encoded_BPD).astype("float32"), **rest}

    def end(self) -> None:
        """As `report`, once the training is over: what it lacks takes no evaluation's room any more."""
        self._said.lacking = None
        self.report()

    def report(self) -> None:
        """Say in one line what all ranks had to encode since the last time, nothing where all was there; all must call it."""
        said = self._said
        parts = self._run.context.gather_objects((said.encoded, said.damaged, self.store.stopped))
        said.encoded = said.damaged = 0
        encoded, damaged = sum(part[0] for part in parts), sum(part[1] for part in parts)
        self._tell_stop(next((stopped for *_, stopped in parts if stopped), None))
        if encoded:
            self.store.refresh()
            anew = f", {damaged:,} of them anew since their rows were damaged" if damaged else ""
            text = f"features: {encoded:,} pictures encoded{anew}; {self.folder} has {amount(self.store.bytes)}"
            self._run.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _rows(self, image_MCHW: np.ndarray, identity_MI: np.ndarray) -> np.ndarray:
        """Rows [M, P, D] float16, each picture encoded once: it may be there by now, and may come twice in a batch."""
        first: dict[bytes, int] = {}
        for place, identity_I in enumerate(identity_MI):
            first.setdefault(identity_I.tobytes(), place)
        rows = {identity: self.store.look(identity).row_PD for identity in first}
        new = [place for identity, place in first.items() if rows[identity] is None]
        if new:
            made_NPD = self._encode(image_MCHW if len(new) == len(image_MCHW) else image_MCHW[new])
            if not self.store.add(identity_MI[new], made_NPD, reserved=self._reserved) and not self._said.crowded:
                self._said.crowded = True
                self._warn(f"the training has yet to fill {self.folder}; what finds no room beside that is encoded each time")
            self._tell_stop(self.store.stopped)
            rows |= {identity_MI[place].tobytes(): row_PD for place, row_PD in zip(new, made_NPD, strict=True)}
        return np.stack([rows[identity_I.tobytes()] for identity_I in identity_MI])

    def _encode(self, image_NCHW: np.ndarray) -> np.ndarray:
        row_NPD = self._encoder(paddle.to_tensor(image_NCHW)).astype("float16").numpy()
        if not np.isfinite(row_NPD).all():
            raise UserError(
                "the image encoder gives numbers that float16 cannot hold (beyond 65504, or none at all); "
                "set dataset.cache=none"
            )
        self._said.encoded += len(row_NPD)
        return row_NPD

    def _tell_stop(self, stopped: str | None) -> None:
        if stopped and not self._said.stopped:
            self._said.stopped = True
            self._warn(f"no more is kept in {self.folder}: {stopped}; what lacks is encoded each time")

    def _warn(self, text: str) -> None:
        self._run.console.print(f"warning: features: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def keeps_features(cfg: RunConfig) -> bool:
    """Whether the config wants a cache, and its task has use for one."""
    return cfg.dataset.cache is Cache.features and may_keep_features(cfg.task)


def row_shape(cfg: VisionConfig) -> tuple[int, int]:
    """(P, D): patches and the class token, and the width."""
    return 1 + (cfg.image_size // cfg.patch_size) ** 2, cfg.width


def crops_kept(cfg: RunConfig, batches_per_epoch: int | None = None) -> int:
    """How many crops of each training picture are kept in a training with epochs of so many batches; None: in an endless one.

    A sample that a mixture takes several times in an epoch may have more of them in a short one.
    """
    if cfg.dataset.transform.crop_scale is None and not cfg.dataset.transform.flip:
        return 1
    crops = cfg.dataset.crops or 1
    if batches_per_epoch is None:
        return crops
    batches = count_steps(cfg.task, batches_per_epoch) * cfg.task.accumulate
    return min(crops, -(-batches // batches_per_epoch))


def rows_read(cfg: RunConfig, batches_per_epoch: int, data_ranks: int) -> int:
    """How many rows a training reads, with epochs of so many batches on each of so many ranks."""
    return count_steps(cfg.task, batches_per_epoch) * cfg.task.accumulate * cfg.task.batch_size * data_ranks


def require_room(cfg: RunConfig, samples: Sequence[Any]) -> None:
    """Refuse a training as `Features.expect` will, before its weights are there, where nothing can have been kept yet.

    Which rows are there, the encoder has to be there to tell; if all are, it does not matter how large they are.

    Raises:
        UserError: what it keeps is more than dataset.cache_gb.
    """
    limit, folder = cfg.dataset.cache_gb, Path(cfg.paths.cache) / "features"
    if limit is None or any(folder.glob("*/*.index")):
        return
    ranks = started_processes()  # each has samples of its own: with others, nothing can be kept
    batches = epoch_length(samples) // (cfg.task.batch_size * ranks)
    crops, most = crops_kept(cfg, batches), rows_read(cfg, batches, ranks)
    size, said = _extent(count_images(samples), crops, most, row_shape(cfg.model.vision))
    if size > 1e9 * limit:
        raise UserError(f"features (train): {said}; {_beyond(1e9 * limit)}")


def _beyond(limit_bytes: float) -> str:
    return f"that is more than dataset.cache_gb={limit_bytes / 1e9:g}; raise it, {_LOWER}"


def _extent(images: int, crops: int, most: int | None, shape: tuple[int, int]) -> tuple[int, str]:
    """Bytes of at most so many rows, and how they come about."""
    rows = images * crops if most is None else min(most, images * crops)
    size = predicted_bytes(rows, shape)
    part = "" if rows == images * crops else f"{rows:,} of "
    kind = f"{' x '.join(map(str, shape))} in float16"
    return size, f"{part}{images:,} images x {crops} crop{'s' if crops > 1 else ''} x {kind}: {amount(size)}"


def count_images(samples: Sequence[Any]) -> int:
    """How many different images samples have."""
    if isinstance(samples, Samples):
        return len(np.unique(samples.image_id_N))
    return len({sample.image_id for sample in samples})


def predicted_bytes(rows: int, shape: tuple[int, int]) -> int:
    """What so many rows take."""
    return rows * shape[0] * shape[1] * DTYPE.itemsize


def _manifest(cfg: RunConfig, encoder: nn.Layer) -> dict[str, Any]:
    """All that the encoder's outputs follow from, but for the pictures."""
    vision = {name: value for name, value in asdict(cfg.model.vision).items() if name not in _WITHOUT_EFFECT}
    vision = {name: value.value if isinstance(value, Enum) else value for name, value in vision.items()}
    if encoder not in _hashes:
        _hashes[encoder] = _hash(encoder)
    mean, std = (list(map(float, given)) for given in (cfg.dataset.transform.mean, cfg.dataset.transform.std))
    return {
        "format": 1,
        "weights": _hashes[encoder],
        "encoder": vision,
        "transform": {"mean": mean, "std": std, "version": transforms.VERSION},
        "precision": cfg.precision.name.value,
        "weights_dtype": weights_dtype(cfg.task).value,
        "rows": {"shape": list(row_shape(cfg.model.vision)), "dtype": DTYPE.name},
    }


def _hash(encoder: nn.Layer) -> str:
    """SHA-256 of the tensors as they are in memory, whatever file they came from."""
    found = sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        array = tensor.numpy()
        found.update(f"{name} {tensor.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        if (compact := compact_of(tensor)) and compact.scale is not None:
            found.update(compact.scale.numpy().data)
    return found.hexdigest()
