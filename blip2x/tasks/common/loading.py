"""Loaders as tasks use them, and what becomes of images that were skipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blip2x.config.run import RunConfig
from blip2x.data.collate import Collate
from blip2x.data.loader import Loader, build_loader
from blip2x.data.transforms import EvalTransform, TrainTransform
from blip2x.engine.run import Run
from blip2x.errors import UserError

_SHOWN = 5


def train_transform(cfg: RunConfig) -> TrainTransform:
    """Random crop and mirror, where the data set's config has them, at the image encoder's size."""
    return TrainTransform(cfg.dataset.transform, cfg.model.vision.image_size)


def eval_transform(cfg: RunConfig) -> EvalTransform:
    """The plain resize to the image encoder's size."""
    return EvalTransform(cfg.dataset.transform, cfg.model.vision.image_size)


def train_loader(cfg: RunConfig, run: Run, samples: Sequence[Any], collate: Collate) -> Loader:
    """Shuffled batches of ``task.batch_size``, equally many on each rank."""
    return build_loader(
        samples,
        collate,
        batch_size=cfg.task.batch_size,
        shuffle=True,
        seed=cfg.seed,
        num_workers=cfg.dataset.num_workers,
        on_bad_image=cfg.dataset.on_bad_image,
        rank=run.context.rank,
        world_size=run.context.world_size,
        drop_last=True,
    )


def eval_loader(cfg: RunConfig, run: Run, samples: Sequence[Any], collate: Collate) -> Loader:
    """Batches of ``task.eval_batch_size`` in order; each sample is on one rank."""
    return build_loader(
        samples,
        collate,
        batch_size=cfg.task.eval_batch_size,
        shuffle=False,
        seed=cfg.seed,
        num_workers=cfg.dataset.num_workers,
        on_bad_image=cfg.dataset.on_bad_image,
        rank=run.context.rank,
        world_size=run.context.world_size,
    )


def finish_evaluation(run: Run, loader: Loader, images: int) -> None:
    """Report what was skipped behind an evaluation that saw `images` images on this rank.

    Raises:
        UserError: no rank saw any.
    """
    report_skipped(run, loader.skipped)
    if not sum(run.context.gather_objects(images)):
        raise UserError(
            f"not one of the images to evaluate on can be read, so there is nothing to score; see {run.folder}/skipped.txt"
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
