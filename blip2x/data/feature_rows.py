"""Loading pictures where a store may have what the image encoder gives of them: then they are not opened.

B samples, F of them found in the store, M that lack, C channels, H height, W width, P patches, D width of the image encoder.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blip2x.data.feature_store import FeatureStore, identity_of
from blip2x.data.samples import Picture
from blip2x.data.transforms import EvalTransform


@dataclass(frozen=True)
class LoadedRow:
    """A picture's row of the store; None: its pixels, from which the row has to be made."""

    row_PD: np.ndarray | None
    identity: bytes
    image_CHW: np.ndarray | None
    damaged: bool  # there was a row, but it is not whole


class StoredTransform:
    """Gives a `LoadedRow` of each picture.

    Args:
        transform: what the encoder's pictures go through.
        store: of that encoder, and of the transform's normalisation.
    """

    def __init__(self, transform: EvalTransform, store: FeatureStore):
        self._transform, self._store = transform, store

    def identity(self, picture: Picture, rng: random.Random) -> bytes:
        """The row's: of the picture and of what the transform makes of it; `UserError` if there is no such picture."""
        return identity_of(picture.identity, self._transform.variant(picture, rng))

    def load(self, picture: Picture, rng: random.Random) -> LoadedRow:
        """Look for the row, and open the picture if there is none; `UserError` where that is impossible."""
        identity = self.identity(picture, rng)
        row_PD, damaged = self._store.look(identity)
        image_CHW = self._transform.load(picture, rng) if row_PD is None else None
        return LoadedRow(row_PD, identity, image_CHW, damaged)


def stack_images(loaded: Sequence[np.ndarray | LoadedRow]) -> dict[str, np.ndarray]:
    """A batch of what a transform gave: ``image_BCHW`` of pixels.

    Of rows: ``stored_FPD``, what was found, and ``stored_F``, its places in the batch; of the others ``image_BCHW``,
    ``identity_MI`` and ``damaged_M``. What would be empty is left out.
    """
    if not isinstance(loaded[0], LoadedRow):
        return {"image_BCHW": np.stack(loaded)}
    found = [place for place, item in enumerate(loaded) if item.row_PD is not None]
    lacking, batch = [item for item in loaded if item.row_PD is None], {}
    if lacking:
        batch["image_BCHW"] = np.stack([item.image_CHW for item in lacking])
        batch["identity_MI"] = np.frombuffer(b"".join(item.identity for item in lacking), np.uint8).reshape(len(lacking), -1)
        batch["damaged_M"] = np.array([item.damaged for item in lacking], np.uint8)
    if found:
        batch["stored_FPD"] = np.stack([loaded[place].row_PD for place in found])
        batch["stored_F"] = np.array(found, np.int64)
    return batch
