"""Two processes on gloo that share every matrix compute what one process computes that has all of it."""

from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).with_name("tensor_worker.py")

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Of an array's largest number. Float32 sums in another order differ by about 1e-7 of it, and each block adds its own; T5's
# attention, whose scores are not scaled, makes ten times that in the gradient. What a rank forgets or adds twice is above 1e-2.
TOLERANCE = 1e-5
NUMBERS = {
    "opt": ("logits", "loss", "gradient", "embeddings", "greedy_scores", "beam_scores"),
    "vision": ("features", "gradient"),
}
NUMBERS["t5"] = NUMBERS["opt"]


@pytest.fixture(scope="module")
def ranks(start, tmp_path_factory):
    """What both ranks found; one start for all tests."""
    return start(WORKER, tmp_path_factory.mktemp("tensor"), processes=2)


def test_the_ranks_have_the_same_samples(ranks):
    assert [found["place"] for found in ranks] == [[0, 1, 0, 2], [0, 1, 1, 2]]


@pytest.mark.parametrize("kind", NUMBERS)
def test_split_over_two_ranks_as_whole(ranks, kind):
    for found in ranks:
        whole, split = found[f"{kind}_whole"], found[f"{kind}_split"]
        for name in NUMBERS[kind]:
            largest = np.abs(whole[name]).max()
            assert largest > 1e-3
            np.testing.assert_allclose(split[name], whole[name], rtol=0, atol=TOLERANCE * largest, err_msg=name)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_split_reader_writes_the_same_text(ranks, kind):
    for found in ranks:
        for how in ("greedy", "beam"):
            ids = found[f"{kind}_whole"][how]
            assert found[f"{kind}_split"][how] == ids and len({word for text in ids for word in text}) > 2


@pytest.mark.parametrize("kind", NUMBERS)
def test_both_ranks_have_the_same_bits_and_half_of_the_numbers(ranks, kind):
    """So that what is trained before a split model stays the same on both."""
    first, second = (found[f"{kind}_split"] for found in ranks)
    assert first == second
    assert first["parameters"] < 0.65 * ranks[0][f"{kind}_whole"]["parameters"]  # norms and positions are whole
