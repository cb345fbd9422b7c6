"""Two processes on gloo train to the same weights as one process that sees all samples."""

from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Float32 sums in another order differ by about 1e-7 per gradient; AdamW with eps=1e-3 turns that into at most
# 0.05 * 1e-7 / 1e-3 = 5e-6 per step, six times. A mean that forgets a rank or a norm over half of the gradients moves
# weights by 1e-2.
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """Weights and metrics of one process, per loss."""
    folder = tmp_path_factory.mktemp("alone")
    return {loss: start(WORKER, folder / loss, "single", loss, "1", processes=1)[0] for loss in ("pairs", "alone")}


def assert_same_training(ranks, reference):
    for found in ranks:
        for name, weights in reference["weights"].items():
            np.testing.assert_allclose(found["weights"][name], weights, atol=TOLERANCE, rtol=0, err_msg=name)
        assert found["metrics"]["loss"] == pytest.approx(reference["metrics"]["loss"], abs=1e-5)


def test_dp_with_a_loss_over_all_ranks(start, alone, tmp_path):
    ranks = start(WORKER, tmp_path, "dp", "pairs", "1", processes=2)
    assert_same_training(ranks, alone["pairs"])
    assert ranks[0]["metrics"]["grad_norm"] == pytest.approx(alone["pairs"]["metrics"]["grad_norm"], rel=1e-4)

    first, second = ranks
    assert first["folder"] == second["folder"]  # an automatic name is agreed upon, the folder made once
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [Path(first["folder"]).name]
    assert len((Path(first["folder"]) / "metrics.jsonl").read_text().splitlines()) == 3  # one rank writes
    for found in ranks:
        assert found["mean"] == 0.5
        assert found["gather_objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["broadcast_object"] == {"rank": 0}
        assert found["all_gather"] == [0, 0, 1, 1]
        assert found["on_main"] == "said by rank 0"


def test_dp_with_accumulation(start, alone, tmp_path):
    assert_same_training(start(WORKER, tmp_path, "dp", "alone", "2", processes=2), alone["alone"])


def test_sharding_stage_1_with_accumulation(start, alone, tmp_path):
    assert_same_training(start(WORKER, tmp_path, "sharding1", "alone", "2", processes=2), alone["alone"])


def test_sharding_stage_1_with_a_loss_over_all_ranks(start, alone, tmp_path):
    assert_same_training(start(WORKER, tmp_path, "sharding1", "pairs", "1", processes=2), alone["pairs"])
