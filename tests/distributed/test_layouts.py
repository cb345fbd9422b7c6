"""Trainings over several ranks, in few launches.

Every way to share a training between ranks gives what one process gets, and goes on from any other way's state.

The objective has a frozen matrix, which tensor parallelism splits, a loss over all ranks' samples ("pairs") or gradient
accumulation ("alone"), a bound on the gradient that cuts, a step that is left out, and a part that only later steps train.
"""

import json
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Float32 sums in another order differ by about 1e-7 per gradient; AdamW with eps=1e-3 turns that into at most
# 0.05 * 1e-7 / 1e-3 = 5e-6 per step, six times. A mean that forgets a rank or a norm over half of the gradients moves
# weights by 1e-2.
TOLERANCE = 3e-5

PAIR = {
    "dp": {"dp": -1},
    "sharding1": {"sharding": -1, "sharding_stage": 1},
    "sharding2": {"sharding": -1, "sharding_stage": 2},
    "tp2": {"tp": 2},
    "sharding3": {"sharding": -1, "sharding_stage": 3},
}
FOUR = {
    "dp_sharding2": {"dp": -1, "sharding": 2, "sharding_stage": 2},
    "dp_sharding3": {"dp": -1, "sharding": 2, "sharding_stage": 3},
    "dp_tp": {"dp": -1, "tp": 2},
    "sharding1_tp": {"sharding": -1, "sharding_stage": 1, "tp": 2},
}
LAYOUTS = {"single": "single", **PAIR, **FOUR}
LOSSES = {"pairs": 1, "alone": 2}  # loss -> micro-batches per step
BRIDGED = ("tp2", next(iter(FOUR)))  # the first ones that need the bridge; those before run on gloo as the product does

EACH = pytest.mark.parametrize("name", [*PAIR, *FOUR])
WITH = pytest.mark.parametrize("loss", LOSSES)


def trainings(names, **more):
    """Steps of the worker's plan; `more` of a training by its name and loss."""
    steps = []
    for name in names:
        if name in BRIDGED:
            steps.append(["bridge", "bridge", {}])
        for loss, accumulate in LOSSES.items():
            settings = {"layout": LAYOUTS[name], "loss": loss, "accumulate": accumulate}
            for key, what in more.items():
                steps.append([f"{name} {loss} {key}", "loop", settings | what(name, loss)])
        if "whole" in more and name != "single":
            steps.append([f"{name} collectives", "collectives", {"layout": LAYOUTS[name]}])
    return steps


@pytest.fixture(scope="module")
def found(start, tmp_path_factory):
    """By training, what each rank found; a first launch writes states down, a second one goes on from them."""
    results = {}
    for layouts, processes in ((PAIR, 2), (FOUR, 4)):
        folder, names = tmp_path_factory.mktemp("layouts"), ["single", *layouts]
        former = dict(zip(names, [names[-1], *names], strict=False))
        first = trainings(names, whole=lambda name, loss: {"write": f"{name}_{loss}"})
        first += [
            [f"fit {name} {loss}", "fit", {"layout": LAYOUTS[name], "loss": loss, "accumulate": accumulate}]
            for loss, accumulate in LOSSES.items()
            for name in ("single", "dp", "sharding1", "sharding3")
            if layouts is PAIR
        ]
        then = trainings(
            names,
            resumed=lambda name, loss: {"begin_with": f"{name}_{loss}"},
            moved=lambda name, loss, former=former: {"begin_with": f"{former[name]}_{loss}"},
        )
        for number, plan in enumerate((first, then)):
            ranks = start(WORKER, folder / str(number), json.dumps(plan), processes=processes)
            for step, _, _ in plan:
                results.setdefault(step, []).extend(rank[step] for rank in ranks)
    return results


def assert_close(ranks, reference):
    for rank in ranks:
        for name, weights in reference["weights"].items():
            np.testing.assert_allclose(rank["weights"][name], weights, atol=TOLERANCE, rtol=0, err_msg=name)
        steps = len(rank["losses"])
        assert rank["losses"] == pytest.approx(reference["losses"][-steps:], abs=TOLERANCE)
        assert rank["norms"] == pytest.approx(reference["norms"][-steps:], rel=1e-5)  # as the losses, over the gradients' size


@EACH
@WITH
def test_ranks_train_as_one_process_does(found, name, loss):
    alone = found[f"single {loss} whole"][0]
    assert min(alone["norms"]) > 0.3  # the bound
    assert_close(found[f"{name} {loss} whole"], alone)


@EACH
@WITH
def test_ranks_stay_alike(found, name, loss):
    first, *others = [{**rank, "held": None} for rank in found[f"{name} {loss} whole"]]
    for rank in others:
        assert rank == first


@EACH
@WITH
def test_ranks_keep_what_they_are_to_keep(found, name, loss):
    """Nothing is kept of frozen parameters; of the trained ones, gradients and optimizer state by one rank of each group."""
    ranks = [rank["held"] for rank in found[f"{name} {loss} whole"]]
    stage, number = LAYOUTS[name].get("sharding_stage", 0), len(found[f"single {loss} whole"][0]["weights"])
    copies = 1 if stage == 0 else 2  # all groups here are of two ranks
    for key, shares in {"states": stage in (1, 2), "gradients": stage == 2}.items():
        held = [rank[key] for rank in ranks]
        if shares:
            assert max(held) < number
            assert sum(held) == number * len(ranks) / copies
        elif stage != 3:
            assert held == [number] * len(ranks)
    assert {rank["slices"] for rank in ranks} == {2 if stage == 3 else 0}  # the matrices of "image"


@EACH
@WITH
def test_what_no_loss_reaches_stays_as_it_is(found, name, loss):
    """No gradient is made up, by which weights would decay."""
    for rank in found[f"{name} {loss} whole"]:
        assert rank["early"] == found[f"single {loss} whole"][0]["early"]


@pytest.mark.parametrize("name", LAYOUTS)
@WITH
def test_resumed_equals_uninterrupted_bit_for_bit(found, name, loss):
    for rank, whole in zip(found[f"{name} {loss} resumed"], found[f"{name} {loss} whole"], strict=True):
        assert rank["weights"] == whole["weights"]
        assert rank["losses"] == whole["losses"][-3:]


@pytest.mark.parametrize("name", LAYOUTS)
@WITH
def test_the_state_of_one_layout_serves_another(found, name, loss):
    """Each goes on from the state of the one before it, one process from the last one's."""
    assert_close(found[f"{name} {loss} moved"], found[f"single {loss} whole"][0])


@EACH
def test_ranks_talk_to_those_with_other_samples(found, name):
    ranks = found[f"{name} collectives"]
    size = len(ranks) // LAYOUTS[name].get("tp", 1)
    for number, rank in enumerate(ranks):
        assert rank["data_rank"] == [number // LAYOUTS[name].get("tp", 1), size]
        assert rank["mean"] == (size - 1) / 2
        assert rank["total"] == size * (size + 1) / 2
        assert rank["any"] == [True, False]
        assert rank["gather_objects"] == [{"rank": other} for other in range(size)]
        assert rank["broadcast_object"] == {"rank": 0}
        assert rank["on_main"] == "said by rank 0"
        # with one data rank nobody else has this one's share of the split matrix
        assert rank["differing"] == {"bias": True, "weight": size > 1}
        for dtype, rows in rank["all_gather"].items():
            expected = [min(other, 1) if dtype == "bool" else other for other in range(size) for _ in range(2)]
            assert rows == expected, dtype


@pytest.mark.parametrize("name", ["dp", "sharding1", "sharding3"])
@WITH
def test_the_training_loop_does_as_on_one_process(found, name, loss):
    alone = found[f"fit single {loss}"][0]
    first, second = found[f"fit {name} {loss}"]
    for rank in (first, second):
        for parameter, weights in alone["weights"].items():
            np.testing.assert_allclose(rank["weights"][parameter], weights, atol=TOLERANCE, rtol=0, err_msg=parameter)
    for metric in ("loss", "grad_norm"):
        assert first["metrics"][metric] == pytest.approx(alone["metrics"][metric], rel=1e-4)
    assert first["folder"] == second["folder"]  # an automatic name is agreed upon, the folder made once
    assert first["lines"] == alone["lines"] == 4  # one rank writes; the last is the validation's


@pytest.mark.slow
def test_a_rank_may_be_late_for_longer_than_gloo_waits(start, tmp_path):
    plan = [["late", "late", {"layout": PAIR["dp"], "seconds": 40}]]
    assert [rank["late"] for rank in start(WORKER, tmp_path, json.dumps(plan), processes=2)] == [[0, 1], [0, 1]]
