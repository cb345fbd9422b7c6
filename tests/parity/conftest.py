"""`close`: compares with a reference, and writes down how far apart the two were when BLIP2X_PARITY_TABLE names a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def close(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`close(name, ours, reference, *, atol, rtol=0.0)`: the same shape, and no element further apart than allowed.

    Takes whatever NumPy makes an array of. `name` is the row of the table in README.md: several calls may share one, and the
    row shows the worst of them. With BLIP2X_PARITY_TABLE=path each call adds a line of JSON to that file, before it asserts;
    table.py makes the table of it.
    """

    def compare(name: str, ours: Any, reference: Any, *, atol: float, rtol: float = 0.0) -> None:
        ours, reference = np.asarray(ours), np.asarray(reference)
        assert ours.shape == reference.shape, f"{name}: {ours.shape} is not the reference's {reference.shape}"
        difference = np.abs(ours.astype("float64") - reference.astype("float64"))
        if path := os.environ.get("BLIP2X_PARITY_TABLE"):
            row = {
                "test": request.node.nodeid,
                "name": name,
                "difference": float(difference.max(initial=0.0)),
                "largest": float(np.abs(reference).max(initial=0.0)),
                "atol": atol,
                "rtol": rtol,
            }
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        np.testing.assert_allclose(ours, reference, rtol=rtol, atol=atol, err_msg=name)

    return compare
