"""The task's samples: how many there are, whether some pictures open, whether any are missing."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip2x.config.dataset import OnBadImage
from blip2x.config.run import RunConfig
from blip2x.data.audit.given import SORTS, files_of
from blip2x.data.feature_store import LEAST_SPARE
from blip2x.data.sequences import epoch_length
from blip2x.data.source import Split
from blip2x.engine.folders import existing_folder, same_disk
from blip2x.engine.memory_table import amount
from blip2x.errors import UserError
from blip2x.tasks.checkup.examined import Examined
from blip2x.tasks.checkup.findings import Findings, sentence
from blip2x.tasks.checkup.machine import checkpoints_bytes
from blip2x.tasks.common.features import (
    count_images,
    crops_kept,
    keeps_features,
    predicted_bytes,
    row_shape,
    rows_read,
)
from blip2x.tasks.pretrain_vision import patches_per_side

_OPENED = 32  # pictures of each split
_SECONDS = 10.0  # for a split; what is not looked at by then is left to task=audit


def reads(examined: Examined) -> list[tuple[str, Split | None]]:
    """What the task asks its data set for; of the image encoder's training, its labels."""
    if examined.stage == "vision":
        return [("labels", "train"), ("labels", "eval")]
    return examined.task_class.reads(examined.cfg) if hasattr(examined.task_class, "reads") else []


def samples_of(examined: Examined, what: str, split: Split | None) -> Sequence[Any]:
    """Those of a split.

    Raises:
        UserError: they are not there, or not what they should be.
    """
    if what == "labels":
        return examined.source.labels(split, patches_per_side=patches_per_side(examined.cfg))
    return getattr(examined.source, what)(*([split] if split else []))


def train_samples(examined: Examined) -> Sequence[Any]:
    """What an epoch goes through. Errors as `samples_of`."""
    what, split = next((what, split) for what, split in reads(examined) if split in ("train", None))
    return samples_of(examined, what, split)


def epoch_batches(examined: Examined, samples: int) -> int:
    """How many batches each rank has of an epoch of so many samples."""
    return samples // (examined.cfg.task.batch_size * examined.layout.data_ranks)


def is_absent(examined: Examined, what: str, split: Split | None) -> bool:
    """Whether the data set has files for it of which not one is there, or no folder of images: nobody has fetched them yet."""
    sorts = [what] if what in SORTS else SORTS
    found = [files_of(examined.source, split or "train", sort) for sort in sorts]
    parts = getattr(getattr(examined.source, "cfg", None), "parts", {})
    if any(not Path(parts[name].images).exists() for files in found for name in files or {}):
        return True
    paths = [getattr(files, name) for its in found for files in (its or {}).values() for name in (*SORTS, "answers")]
    return any(paths) and not any(Path(path).exists() for path in paths if path)


def check_data(examined: Examined) -> Findings:
    """A line for each split that the task reads."""
    out = Findings(examined.name)
    wanted, rows, trained = reads(examined), {}, 0
    for what, split in dict.fromkeys(wanted):
        name = f"{split or 'train'} {what}"
        if split == "val" and examined.source.val_is_eval and (what, "eval") in wanted:
            continue
        try:
            samples = samples_of(examined, what, split)
        except UserError as error:
            absent = is_absent(examined, what, split)
            advice = "task=prepare fetches what may be fetched" if absent else "task=audit says more"
            (out.look if absent else out.broken)(name, sentence(error), advice)
            continue
        out.record.setdefault("samples", {})[name] = len(samples)
        if not len(samples):
            out.broken(name, "no samples", "task=audit says more")
        elif not hasattr(samples[0], "image"):
            out.fine(name, f"{len(samples):,}")
        else:
            _judge_pictures(out, name, samples, examined.cfg)
            if keeps_features(examined.cfg):
                rows[name] = count_images(samples) if split != "train" else _rows_trained(examined, samples)
                trained += rows[name] if split == "train" else 0
    if rows:
        _judge_features(out, rows, trained, examined)
    if not wanted:
        out.fine("data", "the task reads nothing of a data set")
    elif "samples" in out.record and any(split for _, split in wanted):
        out.fine("left to task=audit", "copies of images, leaks between splits, odd texts, and pictures beyond this sample")
    return out


def _rows_trained(examined: Examined, samples: Sequence[Any]) -> int:
    cfg, batches = examined.cfg, max(1, epoch_batches(examined, epoch_length(samples)))
    return min(crops_kept(cfg, batches) * count_images(samples), rows_read(cfg, batches, examined.layout.data_ranks))


def _left_to_checkpoints(examined: Examined) -> float:
    if not examined.trains or not same_disk(Path(examined.cfg.paths.cache), Path(examined.cfg.paths.outputs)):
        return LEAST_SPARE
    try:
        return max(LEAST_SPARE, checkpoints_bytes(examined))
    except UserError:  # the check of the disk says why they cannot be foretold
        return LEAST_SPARE


def _judge_features(out: Findings, rows: dict[str, int], trained: int, examined: Examined) -> None:
    """The size of the cache, were nothing of it there; `trained` of the rows are of pictures to train on."""
    cfg = examined.cfg
    shape, limit, folder = row_shape(cfg.model.vision), cfg.dataset.cache_gb, Path(cfg.paths.cache).absolute()
    size, begun = (predicted_bytes(count, shape) for count in (sum(rows.values()), trained))
    counted = f"{sum(rows.values()):,} rows of {' x '.join(map(str, shape))} in float16"
    said = f"{amount(size)} when all is kept: {counted} ({', '.join(f'{count:,} of {name}' for name, count in rows.items())})"
    free, spare = shutil.disk_usage(existing_folder(folder)).free, _left_to_checkpoints(examined)
    there = sum(path.stat().st_size for path in folder.glob("features/*/*.rows"))  # some of it perhaps
    if limit is not None and size > 1e9 * limit:
        judge = out.broken if begun > 1e9 * limit else out.look
        judge("features", f"{said}; dataset.cache_gb={limit:g} allows less", "raise it, or set dataset.cache=none")
    elif size > free - spare + there:
        judge = out.broken if begun > free - spare + there else out.look
        said = f"{said}; the disk of paths.cache has {amount(free)} free, of which {amount(spare)} are left to checkpoints"
        judge("features", said, "make room, or set dataset.cache=none")
    else:
        out.fine("features", said)


def _judge_pictures(out: Findings, name: str, samples: Sequence[Any], cfg: RunConfig) -> None:
    lot, until = random.Random(cfg.seed), time.monotonic() + _SECONDS
    places = range(len(samples))
    opened, failed = 0, []
    for place in (0, *lot.sample(places[1:], min(_OPENED, len(samples)) - 1)):  # the first one is what a user sees first
        try:
            samples[place].image.open()
        except UserError as error:
            failed.append(sentence(error))
        opened += 1
        if time.monotonic() > until:
            break
    said = f"{len(samples):,} samples; {opened} pictures opened"
    if not failed:
        out.fine(name, said)
        return
    said = f"{said}; {len(failed)} cannot be used: {failed[0]}"
    if cfg.dataset.on_bad_image is OnBadImage.skip and len(failed) < opened:
        out.look(name, f"{said}; left out, as dataset.on_bad_image=skip says", "task=audit finds all of them")
    else:
        out.broken(name, said, "task=audit finds all of them; dataset.on_bad_image=skip leaves them out")
