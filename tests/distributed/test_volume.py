"""What a plan says that ranks send each other is what two processes on gloo hand to paddle, byte for byte."""

from collections import Counter
from pathlib import Path

import pytest

from blip2x.config.compose import compose_config
from blip2x.models.plan.estimate import Training
from blip2x.models.plan.traffic import FULL
from tests.distributed.volume_plan import CASES, LAYOUTS, TRAININGS, WORDS, batch_of

WORKER = Path(__file__).with_name("volume_worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ranks(start, tmp_path_factory):
    """What both ranks exchanged; one start for all tests."""
    return start(WORKER, tmp_path_factory.mktemp("volume"), processes=2)


def planned(layout, kind, accumulate):
    cfg, batch = compose_config(list(TRAININGS[kind])), batch_of(accumulate)
    training = Training(cfg.model, cfg.task, 2 * batch.samples, batch.length, batch.output_length, vocab_sizes=WORDS)
    return training.traffic(LAYOUTS[layout], batch, low=FULL)


@pytest.mark.parametrize(("layout", "kind", "accumulate"), CASES)
def test_bytes_handed_in_are_those_of_the_plan(ranks, layout, kind, accumulate):
    """But for paddle.DataParallel's sums of gradients, which are made in C++."""
    expected = Counter()
    for one in planned(layout, kind, accumulate):
        if not one.hidden:
            expected[one.operation] += one.bytes
    for found in ranks:
        counted = {name: size for name, size in found[f"{layout} {kind}"].items() if name != "sent"}
        assert counted == expected


def test_data_parallelism_sends_the_gradients_once(ranks):
    """By a ring of two ranks each sends 2 (n - 1) / n = 1 times its bytes; what goes with them is small."""
    layout, kind, accumulate = CASES[0]
    expected = sum(one.bytes for one in planned(layout, kind, accumulate))
    for found in ranks:
        assert found[f"{layout} {kind}"]["sent"] == pytest.approx(expected, rel=0.05)
