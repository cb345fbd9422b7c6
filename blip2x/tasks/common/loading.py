"""Loaders as tasks use them, evaluation shared between ranks, and what becomes of images that were skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from paddle import nn

from blip2x.config.run import RunConfig
from blip2x.data.collate import Collate, ImageCollate
from blip2x.data.loader import Loader, build_loader
from blip2x.data.transforms import EvalTransform, TrainTransform
from blip2x.engine.evaluate import track
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.tasks.common.features import Features
from blip2x.tasks.common.merge import require_all

_SHOWN = 5


def train_transform(cfg: RunConfig) -> TrainTransform:
    """Random crop and mirror, where the data set's config has them, at the image encoder's size."""
    return TrainTransform(cfg.dataset.transform, cfg.model.vision.image_size, crops=cfg.dataset.crops)


def eval_transform(cfg: RunConfig) -> EvalTransform:
    """The plain resize to the image encoder's size."""
    return EvalTransform(cfg.dataset.transform, cfg.model.vision.image_size)


def train_loader(
    cfg: RunConfig, run: Run, samples: Sequence[Any], collate: Collate, features: Features | None = None
) -> Loader:
    """Shuffled batches of ``task.batch_size``, equally many on each data rank; with `features`, these come from there."""
    return build_loader(
        samples,
        features.collate(collate) if features else collate,
        batch_size=cfg.task.batch_size,
        shuffle=True,
        seed=cfg.seed,
        num_workers=cfg.dataset.num_workers,
        on_bad_image=cfg.dataset.on_bad_image,
        rank=run.context.data_rank,
        world_size=run.context.data_size,
        drop_last=True,
        completion=features,
    )


def eval_loader(cfg: RunConfig, run: Run, samples: Sequence[Any], collate: Collate, features: Features | None = None) -> Loader:
    """Batches of ``task.eval_batch_size`` in order; each sample is on one data rank. `features` as in `train_loader`."""
    return build_loader(
        samples,
        features.collate(collate) if features else collate,
        batch_size=cfg.task.eval_batch_size,
        shuffle=False,
        seed=cfg.seed,
        num_workers=cfg.dataset.num_workers,
        on_bad_image=cfg.dataset.on_bad_image,
        rank=run.context.data_rank,
        world_size=run.context.data_size,
        completion=features,
    )


class Share:
    """This rank's share of the samples to evaluate on, batch by batch.

    Attributes:
        found: places of the samples that any rank could read, rising, once all batches have been given.

    Args:
        cfg: the whole config.
        run: the task's run.
        samples: all of them, the same on each rank.
        collate: makes their batches.
        description: of the progress bar.
        model: whose image encoder's outputs may be kept, where the config says so: batches then have ``encoded_BPD`` in the
            place of ``image_BCHW``; None: pictures are wanted.
        may_be_empty: whether it is no mistake if not one sample can be read.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run: Run,
        samples: Sequence[Any],
        collate: Collate,
        description: str,
        *,
        model: nn.Layer | None = None,
        may_be_empty: bool = False,
    ):
        self.found = np.array([], dtype=np.int64)
        self._run, self._samples, self._description, self._may_be_empty = run, len(samples), description, may_be_empty
        self._features = None if model is None else Features.of(cfg, run, model)
        if self._features:
            self._features.expect(samples, collate, 1, description, begins=False)
        self._loader = eval_loader(cfg, run, samples, collate, self._features)

    @classmethod
    def of_images(
        cls, cfg: RunConfig, run: Run, samples: Sequence[Any], description: str, model: nn.Layer | None = None
    ) -> Share:
        """The share of the pictures alone."""
        return cls(cfg, run, samples, ImageCollate(eval_transform(cfg)), description, model=model)

    def __iter__(self) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """(Places among the samples, batch), one after the other; behind the last one it is seen whether none is missing.

        Raises:
            UserError: not one sample can be read, on any rank.
            RuntimeError: a sample was on no rank, or on two.
        """
        places: list[int] = []
        for batch in track(self._run, self._loader, self._description, len(self._loader)):
            places += self._loader.samples
            yield self._loader.samples, batch
        report_skipped(self._run, self._loader.skipped)
        if self._features:
            self._features.report()
        parts = self._run.context.gather_objects((places, self._loader.left_out))
        places_N = np.array([place for part, _ in parts for place in part], dtype=np.int64)
        self.found = require_all(places_N, samples=self._samples, left_out=sum(left_out for _, left_out in parts))
        if not len(self.found) and not self._may_be_empty:
            raise UserError(
                "not one of the images to evaluate on can be read, so there is nothing to score; "
                f"see {self._run.folder}/skipped.txt"
            )


def report_skipped(run: Run, sentences: Sequence[str]) -> None:
    """Count and name what was left out, of all ranks: the first few in the terminal, all in skipped.txt."""
    write_skipped(run, [sentence for rank in run.context.gather_objects(list(sentences)) for sentence in rank])


def write_skipped(run: Run, sentences: Sequence[str]) -> None:
    """As `report_skipped`, of the main rank alone: for one that fails while the others wait for it elsewhere."""
    found = list(dict.fromkeys(sentences))
    if not found or not run.context.is_main:
        return
    path = run.path("skipped.txt")
    known = dict.fromkeys(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [])
    new = [sentence for sentence in found if sentence not in known]
    path.write_text("".join(f"{sentence}\n" for sentence in [*known, *new]), encoding="utf-8")
    if new:
        run.console.print(f"warning: {len(new)} left out, all of them named in {path}", style="yellow", markup=False)
        for sentence in new[:_SHOWN]:
            run.console.print(f"  {sentence}", markup=False, highlight=False)
