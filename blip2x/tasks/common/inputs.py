"""Finding the data set that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from omegaconf import OmegaConf

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample, has_truth
from blip2x.data.source import Source, Split
from blip2x.errors import UserError
from blip2x.registry import DATASETS


def build_source(cfg: RunConfig) -> Source:
    """The data set; the same object for the same config, so that a pipeline reads its files once."""
    return _build(_Key(cfg.dataset))


def require_captions(cfg: RunConfig, split: Split | None, samples: Sequence[CaptionSample], what: str) -> None:
    """Raise `UserError` where the captions of a split are its owner's secret, so that `what` cannot be done."""
    if not has_truth(samples):
        raise UserError(
            f"{what} needs true captions, and {cfg.dataset.name} has none for {split}; "
            "choose a split or a data set that has some"
        )


class _Key:
    """A data set's config, compared by content."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.text = OmegaConf.to_yaml(OmegaConf.structured(cfg))

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=2)
def _build(key: _Key) -> Source:
    return DATASETS.get(key.cfg.kind)(key.cfg)
