"""Which layout to take on how many GPUs: the fastest that fits in memory, and of equally fast ones the simplest."""

from __future__ import annotations

import math
from collections.abc import Iterator

from blip2x.models.plan.assumptions import MEMORY_USED, TENSOR_DEGREES, TIE, Machine
from blip2x.models.plan.estimate import Estimate, Training, estimate, fits
from blip2x.models.plan.traffic import Layout
from blip2x.parallel.degrees import Degrees

MOST_MICRO_BATCHES = 64


def layouts(training: Training, machine: Machine, count: int) -> Iterator[Layout]:
    """Those of `count` GPUs, the simplest first; sharding over all data ranks, or over those of a node."""
    splits = "language" not in training.trained_parts and not training.contrasts and training.task.kind != "pretrain_vision"
    splits = splits and not training.keeps_features  # which is for ranks with samples of their own
    for tp in TENSOR_DEGREES if splits else (1,):
        own = training.cfg.language
        if count % tp or tp > machine.node or own.num_heads % tp or own.mlp_width % tp:
            continue
        ranks = count // tp
        yield Layout(Degrees(ranks, 1, tp))
        inside = math.gcd(ranks, max(1, machine.node // tp))
        for stage in (1, 2, 3):
            for sharing in sorted({ranks, inside} - {1}, reverse=True):
                yield Layout(Degrees(ranks // sharing, sharing, tp), stage)


def best_of(training: Training, machine: Machine, layout: Layout) -> Estimate | None:
    """With as few micro-batches as fit; None: nothing does."""
    room = machine.memory * MEMORY_USED - training.kept(layout)
    if room <= 0:
        return None
    per_row = training.bytes_per_row(layout)
    accumulate = _halvings(training.samples / layout.data_ranks * per_row / room) if per_row else 1
    while accumulate == 1 or (accumulate <= MOST_MICRO_BATCHES and accumulate * layout.data_ranks <= training.samples):
        found = estimate(training, machine, layout, accumulate)
        if fits(found, machine):
            return found
        # so many at least, as activations grow with the rows
        least = _halvings((found.memory - training.kept(layout)) / room * accumulate)
        accumulate = max(2 * accumulate, least)
    return None


def _halvings(times: float) -> int:
    """The largest power of 2 that is not above `times`."""
    return 2 ** max(0, math.floor(math.log2(times)))


def recommend(training: Training, machine: Machine, count: int) -> Estimate | None:
    """The layout to take on `count` GPUs; None: none fits, or there are fewer samples than ranks."""
    simplest_first = [one for one in layouts(training, machine, count) if one.data_ranks <= training.samples]
    at_best = {one: at_least(training, machine, one) for one in simplest_first}
    found: dict[Layout, Estimate] = {}
    for layout in sorted(simplest_first, key=at_best.__getitem__):
        if found and at_best[layout] > (1 + TIE) * min(one.step for one in found.values()):  # and so are all behind it
            break
        one = best_of(training, machine, layout)
        if one:
            found[layout] = one
    if not found:
        return None
    fastest = max(one.samples_per_second for one in found.values())
    good = (found[layout] for layout in simplest_first if layout in found)
    return next(one for one in good if one.samples_per_second * (1 + TIE) >= fastest)


def at_least(training: Training, machine: Machine, layout: Layout) -> float:
    """Seconds of a step in one micro-batch, whether it fits or not."""
    return estimate(training, machine, layout, 1, memory=False).step
