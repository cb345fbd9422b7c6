"""Results of any number of ranks, put together in order; one that is lost or came twice is found."""

from __future__ import annotations

import numpy as np
import pytest

from blip2x.tasks.common.merge import gather_array, gather_rows, require_all

UNREADABLE = {2, 7}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", range(10))
def test_rows_and_arrays_come_in_the_order_of_the_samples(over_ranks, samples, ranks):
    expected = np.array([place for place in range(samples) if place not in UNREADABLE], dtype=np.int64)

    def work(run):
        own = [place for place in range(run.context.rank, samples, ranks) if place not in UNREADABLE]
        rows = gather_rows(run.context, [(place, f"row {place}") for place in own], expected)
        blocks = [np.full((1, 2), place, np.float32) for place in own]
        return rows, gather_array(run.context, own, blocks, expected) if samples else None

    for rows, array in over_ranks(ranks, work):
        assert rows == [f"row {place}" for place in expected]
        if samples:
            assert array.dtype == np.float32 and array.tolist() == [[place, place] for place in expected]


@pytest.mark.parametrize("places", [[0, 1, 2, 4], [0, 1, 2, 3, 4, 4], [0, 1, 2, 4, 4], [0, 1, 2, 4, 5], [0, 1, 2, 4, 9]])
def test_what_is_lost_doubled_or_foreign_is_found(over_ranks, places):
    """Also where as many are lost as came twice; of six samples the last one cannot be read."""
    expected = np.arange(5)

    def rows(run):
        gather_rows(run.context, [(place, "") for place in places[run.context.rank :: 2]], expected)

    def arrays(run):
        own = places[run.context.rank :: 2]
        gather_array(run.context, own, [np.zeros((len(own), 3))], expected)

    for work in (rows, arrays):
        with pytest.raises(RuntimeError, match=f"^{len(places)} results came from all ranks, not 5"):
            over_ranks(2, work)


@pytest.mark.parametrize("places", [[0, 1, 2, 4], [0, 1, 2, 3, 4, 4], [0, 1, 2, 4, 4], [0, 1, 2, 4, 9]])
def test_samples_that_no_rank_or_two_ranks_evaluated_are_found(places):
    assert require_all(np.array([3, 0, 4, 1, 2]), samples=6, left_out=1).tolist() == [0, 1, 2, 3, 4]
    said = rf"^{len(places)} samples were evaluated by all ranks together, not 5 \(6 without 1 that cannot be read\)"
    with pytest.raises(RuntimeError, match=said):
        require_all(np.array(places), samples=6, left_out=1)
