"""The training data as one stream of batches, in which a training can go on anywhere."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol

from blip2x.errors import UserError


class Loader(Protocol):
    """Gives the batches of one epoch each time it is iterated, from batch `first` of the last `set_epoch` on."""

    samples: list[int]  # places in the data set of those in the batch that was given last
    images: int  # in all batches so far
    loading_seconds: float  # that its workers, or this process, took to make them

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Say which epoch comes next."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __len__(self) -> int: ...


class Stream:
    """The loader's batches, epoch after epoch; `batch` of `epoch` comes next."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self.epoch = self.batch = 0
        self._batches: Iterator[dict[str, Any]] | None = None

    @property
    def samples(self) -> list[int]:
        """Places in the data set of the newest batch's samples."""
        return self._loader.samples

    @property
    def loaded(self) -> tuple[int, float]:
        """Pictures that were loaded so far, and the seconds that it took one worker."""
        return self._loader.images, self._loader.loading_seconds

    def move(self, epoch: int, batch: int) -> None:
        """Go on with `batch` of `epoch`."""
        self.epoch, self.batch = (epoch, batch) if batch < len(self._loader) else (epoch + 1, 0)
        self.close()

    def close(self) -> None:
        """Leave off within an epoch."""
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._batches = None

    def __next__(self) -> dict[str, Any]:
        """The next batch.

        Raises:
            UserError: a whole epoch has none.
        """
        if self._batches is None:
            self._loader.set_epoch(self.epoch, self.batch)
            self._batches = iter(self._loader)
        batch = next(self._batches, None)
        if batch is None:
            if self.batch == 0:
                raise UserError(f"epoch {self.epoch} of the training data is empty; see the log for samples that were skipped")
            self.move(self.epoch + 1, 0)
            return next(self)
        self.batch += 1
        return batch
