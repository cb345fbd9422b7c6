"""``dataset``: where images and texts come from and how an image becomes a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Dict, List, Optional

from omegaconf import MISSING

from blip2x.config.schema import schema
from blip2x.errors import UserError


class OnBadImage(Enum):
    """What to do with an image that is missing or cannot be decoded."""

    stop = "stop"
    skip = "skip"  # leave the sample out; each one is counted and named in the log


class Cache(Enum):
    """What is kept of a data set's images."""

    none = "none"
    features = "features"  # a frozen image encoder's outputs, below paths.cache; see docs/features.md


@dataclass
class TransformConfig:
    """From a picture to numbers; the evaluation transform is the plain resize to the square."""

    mean: List[float] = MISSING  # per channel, of pixels in 0..1
    std: List[float] = MISSING  # per channel, of pixels in 0..1
    crop_scale: Optional[List[float]] = MISSING  # training: random crop's share of the area [low, high]; null: no crop
    flip: bool = MISSING  # training: mirror half of the images; wrong where left and right are told apart


@dataclass
class DatasetConfig:
    """What every data set has."""

    kind: str = MISSING
    name: str = MISSING  # the option's name: goes into run names and reports
    transform: TransformConfig = field(default_factory=TransformConfig)
    on_bad_image: OnBadImage = MISSING  # what to do with one that is missing or cannot be decoded
    num_workers: int = MISSING  # loader processes; 0: in the training process
    max_pixels: int = MISSING  # larger pictures are refused before they are decoded
    crops: Optional[int] = MISSING  # fixed training crops per image, epoch e uses number e mod crops; null: new ones each epoch
    cache: Cache = MISSING  # features: what the frozen image encoder gives is kept, so that no image is encoded twice
    cache_gb: Optional[float] = MISSING  # 10^9 bytes that kept features of one encoder may take; null: as the disk allows
    eval_limit: Optional[int] = MISSING  # evaluate on the first N images only; null: all


@schema("dataset", "digits")
@dataclass
class DigitsConfig(DatasetConfig):
    """Scenes of one to three handwritten digits, coloured and placed on a grid."""

    kind: str = "digits"
    seed: int = MISSING  # of the scenes
    train_scenes: int = MISSING  # how many
    test_scenes: int = MISSING  # how many, with handwriting that no training scene shows
    max_digits: int = MISSING  # digits per scene: 1 .. max_digits (at most 3)
    grid: int = MISSING  # the canvas is grid x grid cells, a digit fills one cell
    cell: int = MISSING  # pixels per cell side
    colours: List[str] = MISSING  # names that the painter knows
    held_out_combinations: int = MISSING  # colour-digit pairs that never occur in training
    held_out_digits: float = MISSING  # share of the 1,797 source images kept for the test scenes
    captions_per_image: int = MISSING  # at most; all of them name every digit
    questions_per_image: int = MISSING  # at most, of as many types as possible
    captions_per_document: int = MISSING  # texts for the language model: at most
    questions_per_document: int = MISSING  # texts for the language model: at most, such as its captions answer


@dataclass
class AnnotationFiles:
    """What one split has, as paths of annotation files; null: it has nothing of that sort."""

    captions: Optional[str] = None  # a file
    questions: Optional[str] = None  # a file
    answers: Optional[str] = None  # where they are apart from the questions; without them the split has no true answers
    image: Optional[str] = None  # where a file gives numbers only: an image's path, e.g. val2014/COCO_val2014_{:012d}.jpg


class Content(Enum):
    """What is in a file that can be fetched."""

    annotations = "annotations"
    images = "images"


@dataclass
class RemoteFile:
    """A file that its owner serves, and what becomes of it."""

    url: str = MISSING  # address
    path: str = MISSING  # where it goes
    content: Content = Content.annotations  # what is in it
    size: Optional[int] = None  # bytes; null: not published
    sha256: Optional[str] = None  # checksum; null: not published
    md5: Optional[str] = None  # checksum; null: not published
    unpack: Optional[str] = None  # the folder that an archive's members go into; null: the file stays as it is
    gives: List[str] = field(default_factory=list)  # files and folders that come out of an archive, below `unpack`
    members: Optional[int] = None  # how many files these are; null: not published


@dataclass
class ByHand:
    """What no command may fetch: its owner wants to be asked, or gives it to those who log in."""

    path: str = MISSING  # where it has to be put: a file, or a folder
    how: str = MISSING  # to get it
    content: Content = Content.images  # what is in it


@dataclass
class LinkedImages:
    """Images that their owners serve one by one."""

    lists: List[str] = MISSING  # files with their addresses: {"url", "caption"} each, TSV, or COCO's format with "coco_url"
    captions: Optional[str] = None  # annotation file that is written of what could be fetched; null: there is one already


@dataclass
class ImageTextPart:
    """One image folder with its annotation files, and where both can be had."""

    images: str = MISSING  # folder of the images
    format: str = "entries"  # of the annotation files: a module of blip2x/data/formats
    weight: float = 1.0  # how often each sample is taken in a training epoch; 0.5: half of them, other ones each time
    splits: Dict[str, AnnotationFiles] = field(default_factory=dict)
    files: Dict[str, RemoteFile] = field(default_factory=dict)
    linked: Dict[str, LinkedImages] = field(default_factory=dict)
    by_hand: Dict[str, ByHand] = field(default_factory=dict)
    licence: str = ""  # what its owners ask of users


@schema("dataset", "image_text")
@dataclass
class ImageTextConfig(DatasetConfig):
    """Images with captions or questions from one or several parts, which training mixes."""

    kind: str = "image_text"
    parts: Dict[str, ImageTextPart] = MISSING
    train_split: str = MISSING  # what trainings learn from: a name in parts.<name>.splits
    val_split: Optional[str] = MISSING  # what trainings choose their best checkpoint by; null: eval_split
    eval_split: str = MISSING  # what evaluations report
    annotation_cache: str = MISSING  # folder of tables made from annotation files, which open at once


@schema("dataset", "custom")
@dataclass
class CustomConfig(DatasetConfig):
    """Your own pictures: captions and questions in JSON, JSONL, CSV or TSV, or text files beside the images."""

    kind: str = "custom"
    images: str = MISSING  # folder of the pictures
    train_captions: Optional[str] = MISSING  # a file, or a folder below `images` whose pictures have text files beside them
    val_captions: Optional[str] = MISSING  # null: eval_captions
    eval_captions: Optional[str] = MISSING  # what evaluations report
    train_questions: Optional[str] = MISSING  # a file
    val_questions: Optional[str] = MISSING  # null: eval_questions
    eval_questions: Optional[str] = MISSING  # what evaluations report
    annotation_cache: str = MISSING  # folder of tables made from annotation files, which open at once


def check_transform(cfg: TransformConfig) -> None:
    """Raise `UserError` where lengths or ranges are impossible."""
    if len(cfg.mean) != 3 or len(cfg.std) != 3:
        raise UserError(f"dataset.transform.mean and .std need 3 numbers each, got {cfg.mean} and {cfg.std}")
    if min(cfg.std) <= 0:
        raise UserError(f"dataset.transform.std must be positive, got {cfg.std}")
    if cfg.crop_scale is not None and not (len(cfg.crop_scale) == 2 and 0 < cfg.crop_scale[0] <= cfg.crop_scale[1] <= 1):
        raise UserError(f"dataset.transform.crop_scale must be [low, high] with 0 < low <= high <= 1, got {cfg.crop_scale}")
