"""What evaluation loops share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from blip2x.engine.batches import batch_size
from blip2x.engine.progress import ProgressBar
from blip2x.engine.run import Run


def track(run: Run, batches: Iterable[Any], description: str, total: int) -> Iterator[Any]:
    """Go through `batches`, showing how many of `total` are done, the rate and the time left."""
    with ProgressBar(run.console, description, total) as bar:
        for batch in batches:
            yield batch
            bar.advance(batch_size(batch) if isinstance(batch, dict) else len(batch))
