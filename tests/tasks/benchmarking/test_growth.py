"""Each operation whose growth is measured can be measured, and does what it says."""

from __future__ import annotations

import pytest

from blip2x.engine.run import Run
from blip2x.tasks.benchmarking.growth import GROWTHS


@pytest.mark.parametrize("name", GROWTHS)
def test_each_works_at_a_small_size(name):
    assert 0 < GROWTHS[name](50) < float("inf")


def test_predictions_are_written_as_a_run_writes_them(monkeypatch):
    written = []
    monkeypatch.setattr(Run, "write_predictions", lambda self, rows: written.extend(rows))
    GROWTHS["writing predictions"](50)
    assert len(written) == 50
