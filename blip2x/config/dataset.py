"""``dataset``: where images and texts come from and how an image becomes a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import List, Optional

from omegaconf import MISSING

from blip2x.config.schema import schema
from blip2x.errors import UserError


class OnBadImage(Enum):
    """What to do with an image that is missing or cannot be decoded."""

    stop = "stop"
    skip = "skip"  # leave the sample out; each one is counted and named in the log


@dataclass
class TransformConfig:
    """From a picture to numbers; the evaluation transform is the plain resize to the square."""

    mean: List[float] = MISSING  # per channel, of pixels in 0..1
    std: List[float] = MISSING
    crop_scale: Optional[List[float]] = MISSING  # training: random crop's share of the area [low, high]; null: no crop
    flip: bool = MISSING  # training: mirror half of the images; wrong where left and right are told apart


@dataclass
class DatasetConfig:
    """What every data set has."""

    kind: str = MISSING
    name: str = MISSING  # the option's name: goes into run names and reports
    transform: TransformConfig = field(default_factory=TransformConfig)
    on_bad_image: OnBadImage = MISSING
    num_workers: int = MISSING  # loader processes; 0: in the training process
    max_pixels: int = MISSING  # larger pictures are refused before they are decoded
    eval_limit: Optional[int] = MISSING  # evaluate on the first N images only; null: all


@schema("dataset", "digits")
@dataclass
class DigitsConfig(DatasetConfig):
    """Scenes of one to three handwritten digits, coloured and placed on a grid."""

    kind: str = "digits"
    seed: int = MISSING
    train_scenes: int = MISSING
    test_scenes: int = MISSING
    max_digits: int = MISSING  # digits per scene: 1 .. max_digits (at most 3)
    grid: int = MISSING  # the canvas is grid x grid cells, a digit fills one cell
    cell: int = MISSING  # pixels per cell side
    colours: List[str] = MISSING
    held_out_combinations: int = MISSING  # colour-digit pairs that never occur in training
    held_out_digits: float = MISSING  # share of the 1,797 source images kept for the test scenes
    captions_per_image: int = MISSING  # at most; all of them name every digit
    questions_per_image: int = MISSING  # at most, of as many types as possible
    captions_per_document: int = MISSING  # texts for the language model: at most
    questions_per_document: int = MISSING  # texts for the language model: at most, such as its captions answer


@dataclass
class ImageTextPart:
    """One image folder with its annotation files; a file that is null is not there."""

    images: str = MISSING
    train_captions: Optional[str] = None
    eval_captions: Optional[str] = None
    eval_questions: Optional[str] = None


@schema("dataset", "custom")
@dataclass
class CustomConfig(DatasetConfig):
    """Your own pictures: COCO-Karpathy style captions and VQA style questions beside an image folder."""

    kind: str = "custom"
    images: str = MISSING
    train_captions: Optional[str] = MISSING
    eval_captions: Optional[str] = MISSING
    eval_questions: Optional[str] = MISSING


@schema("dataset", "mixture")
@dataclass
class MixtureConfig(DatasetConfig):
    """Several `custom` parts, read one after the other as one data set."""

    kind: str = "mixture"
    parts: List[ImageTextPart] = MISSING


def check_transform(cfg: TransformConfig) -> None:
    """Raise `UserError` where lengths or ranges are impossible."""
    if len(cfg.mean) != 3 or len(cfg.std) != 3:
        raise UserError(f"dataset.transform.mean and .std need 3 numbers each, got {cfg.mean} and {cfg.std}")
    if min(cfg.std) <= 0:
        raise UserError(f"dataset.transform.std must be positive, got {cfg.std}")
    if cfg.crop_scale is not None and not (len(cfg.crop_scale) == 2 and 0 < cfg.crop_scale[0] <= cfg.crop_scale[1] <= 1):
        raise UserError(f"dataset.transform.crop_scale must be [low, high] with 0 < low <= high <= 1, got {cfg.crop_scale}")
