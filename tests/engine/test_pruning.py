"""Which trainings of a sweep are stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from blip2x.config.run import PruneConfig
from blip2x.config.task import Best
from blip2x.engine.pruning import MedianPruner, Pruned
from blip2x.parallel.context import Context


def write(sweep: Path, name: str, *rows: tuple[int, float], stage: str = "s1") -> None:
    (sweep / name).mkdir(parents=True)
    lines = [json.dumps({"stage": stage, "step": step, "loss": loss}) for step, loss in rows]
    (sweep / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "s1", "st')  # one is being written


def pruner(sweep: Path, *, context: Context | None = None, best_is: Best = Best.min, min_step: int = 0) -> MedianPruner:
    cfg = PruneConfig(metric="s1.loss", best_is=best_is, min_runs=3, min_step=min_step)
    return MedianPruner(cfg, SimpleNamespace(stage="s1", root=sweep / "own", context=context or Context()))


def stops(prune: MedianPruner, step: int, **metrics: float) -> bool:
    try:
        prune(step, metrics)
        return False
    except Pruned as stop:
        assert (stop.stage, stop.step) == ("s1", step)
        return True


@pytest.fixture
def sweep(tmp_path):
    write(tmp_path, "a", (10, 1.0), (20, 0.5))
    write(tmp_path, "b", (10, 2.0), (20, 0.7))
    write(tmp_path, "c", (10, 9.0), (10, 3.0), (20, float("nan")))  # gone on with, then diverged
    write(tmp_path, "own", (10, 0.0))
    write(tmp_path, "d", (10, 100.0), stage="s2")
    return tmp_path


def test_worse_than_the_median(sweep):
    prune = pruner(sweep)
    assert stops(prune, 10, loss=2.1) and not stops(prune, 10, loss=2.0) and not stops(prune, 10, loss=1.0)
    prune = pruner(sweep, best_is=Best.max)
    assert stops(prune, 10, loss=1.9) and not stops(prune, 10, loss=2.0)
    with pytest.raises(Pruned, match=r"s1.loss is 2.5 at step 10, and 2 in the middle of 3 other runs"):
        pruner(sweep)(10, {"loss": 2.5})


def test_nothing_to_compare_with(sweep):
    """Two runs have come to step 20, none to step 11; the metric was not measured; it is early."""
    prune = pruner(sweep)
    assert not stops(prune, 20, loss=9.0) and not stops(prune, 11, loss=9.0) and not stops(prune, 10, other=9.0)
    assert not stops(pruner(sweep, min_step=11), 10, loss=9.0)
    prune = pruner(sweep)
    prune._run.stage = "s2"
    assert not stops(prune, 10, loss=9.0)


def test_a_loss_that_is_no_number_is_worse(sweep):
    assert stops(pruner(sweep), 10, loss=float("nan")) and stops(pruner(sweep, best_is=Best.max), 10, loss=float("nan"))


def test_all_ranks_stop(sweep):
    """Rank 1 does not look at files, and does what rank 0 says."""

    class Second(Context):
        def broadcast_object(self, value):
            assert value is None
            return "rank 0 says so"

    assert stops(pruner(sweep, context=Second(rank=1, world_size=2)), 99, loss=0.0)
