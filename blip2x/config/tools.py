"""``task``, those that train nothing: to use a model, to look something over, to fetch and to convert."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, List, Optional

from omegaconf import MISSING

from blip2x.config.schema import schema
from blip2x.config.task import DecodingConfig, FloatType, TaskConfig


class PredictionFormat(Enum):
    """Files that predictions are written to."""

    jsonl = "jsonl"  # predictions.jsonl, which the report and loggers read, too
    csv = "csv"  # predictions.csv, a line per text
    html = "html"  # predictions.html, a page with the pictures


@schema("task", "predict")
@dataclass
class PredictConfig(DecodingConfig):
    """Run a trained model on any pictures."""

    kind: str = "predict"
    eval_batch_size: int = MISSING  # images, and prompts, at a time
    inputs: Any = (
        MISSING  # files, folders, patterns (*, ?, [a-z], **), http(s) addresses: a list, or one; null: prompts names them
    )
    prompt: str = MISSING  # with a file of prompts "{}" stands for each of them; "" is each as it is
    prompts: Optional[str] = (
        MISSING  # file: .txt with one per line; .jsonl or .csv with "prompt" and perhaps "image"; null: none
    )
    chat: bool = (
        MISSING  # prompts are the turns of one conversation about each image: each follows those before and the answers
    )
    chat_tokens: int = MISSING  # of a conversation, the last question included; the oldest turns are left out
    formats: List[PredictionFormat] = MISSING  # files that are written
    stage: int = MISSING  # 1: captions from the Q-Former alone; 2: from the language model


class Split(Enum):
    """The parts of a data set."""

    train = "train"
    val = "val"
    eval = "eval"


class FeatureMode(Enum):
    """What features are of."""

    image = "image"
    text = "text"
    multimodal = "multimodal"  # of an image and a text together


class FeatureFormat(Enum):
    """Files that features are written to."""

    safetensors = "safetensors"
    parquet = "parquet"


@schema("task", "extract_features")
@dataclass
class ExtractFeaturesConfig(TaskConfig):
    """Write what a stage-1 model makes of images, texts, or both together."""

    kind: str = "extract_features"
    mode: FeatureMode = MISSING  # what features are of
    split: Split = MISSING  # of the data set
    inputs: Any = MISSING  # pictures as for task=predict, instead of the data set's; null: the data set's
    format: FeatureFormat = MISSING  # of the files
    dtype: FloatType = MISSING  # of the features in the files
    shard_size: int = MISSING  # images per file; where mode is text, texts
    eval_batch_size: int = MISSING  # images or texts per rank at a time
    max_txt_len: int = MISSING  # tokens of a text; longer ones are cut
    clean_texts: bool = MISSING  # lower case and without most punctuation, as BLIP's training captions


class Format(Enum):
    """Whose files are written."""

    huggingface = "huggingface"  # a folder that transformers loads
    blip2x = "blip2x"  # a checkpoint as training writes it, frozen parts included


class StoredType(Enum):
    """Types of numbers in files."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@schema("task", "convert")
@dataclass
class ConvertConfig(TaskConfig):
    """Write a model's weights in another format."""

    kind: str = "convert"
    to: Format = MISSING  # whose files are written
    dtype: Optional[StoredType] = MISSING  # null: each tensor keeps its own
    max_shard_gb: float = MISSING  # of Hugging Face's files; the last one is smaller


@dataclass
class LinksConfig:
    """How images that are served one by one are fetched."""

    connections: int = MISSING  # at a time
    timeout: float = MISSING  # seconds, for a whole image
    attempts: int = MISSING  # per image and run
    max_mb: float = MISSING  # larger images are left out
    max_side: Optional[int] = MISSING  # pixels; larger images are stored smaller, as JPEG; null: all stay as they are
    retry_failed: bool = MISSING  # ask again for those that an earlier run could not fetch, or that are gone


@schema("task", "prepare")
@dataclass
class PrepareConfig(TaskConfig):
    """Fetch a data set's files, unpack them, and check what is there."""

    kind: str = "prepare"
    images: bool = MISSING  # false: annotations only
    skip: List[str] = MISSING  # files to leave out, by their names in dataset.parts.*.files, .linked and .by_hand
    parallel: int = MISSING  # files at a time
    keep_archives: bool = MISSING  # false: they are removed when they are unpacked
    verify: bool = MISSING  # compute all checksums and count all members again; nothing is fetched
    links: LinksConfig = field(default_factory=LinksConfig)


class KeysShown(Enum):
    """Which values of the config a check-up prints; all of them are in its config_origin.csv."""

    changed = "changed"  # those that are not the options' own: of the command line, an experiment, a recipe, the environment
    all = "all"


class PlannedOn(Enum):
    """GPUs that a check-up plans for, see docs/scaling.md."""

    a100_40gb = "a100_40gb"
    a100_80gb = "a100_80gb"
    h100_80gb = "h100_80gb"


@schema("task", "doctor")
@dataclass
class DoctorConfig(TaskConfig):
    """Look a task over before hours are spent on it; nothing is kept but what was found, and no weights are needed."""

    kind: str = "doctor"
    of: Optional[str] = MISSING  # the task to look at; null: the one that the overrides choose, e.g. by an experiment
    overrides: List[str] = MISSING  # of that task alone, as on the command line, e.g. "task.batch_size=16"
    world_size: Optional[int] = MISSING  # ranks; null: as many as were started
    steps: Any = MISSING  # one training step and one generation: true | false | auto (where memory and, on a CPU, time allow)
    keys: KeysShown = MISSING  # of the config to print: those that are not the options' own, or all; a file has all of them
    plan_on: Optional[PlannedOn] = MISSING  # of a training: time, memory and layout on 1 to 512 of these GPUs; null: no plan
    words: Optional[List[str]] = MISSING  # the other overrides; null: those of this command line


@dataclass
class SizesConfig:
    """The sizes at which each curve is measured, all rising."""

    batch: List[int] = MISSING  # samples per rank and step
    image_tokens: List[int] = MISSING  # patches of an image, the class token not counted: square numbers
    text_length: List[int] = MISSING  # tokens of a text
    queries: List[int] = MISSING  # of the Q-Former
    new_tokens: List[int] = MISSING  # written per text
    images: List[int] = MISSING  # that are captioned, asked about or searched in a repeat
    operations: List[int] = MISSING  # entries that operations on data and scores handle


@schema("task", "benchmark")
@dataclass
class BenchmarkConfig(TaskConfig):
    """Measure what tasks cost, part by part; weights are random where none are given, and nothing is trained or kept."""

    kind: str = "benchmark"
    of: List[str] = MISSING  # of pretrain_stage1, pretrain_stage2, caption, vqa_zeroshot, retrieval
    data: bool = MISSING  # the data set's pictures and texts; false: made-up ones, which need no data set and no tokenizer
    batch_size: int = MISSING  # samples per rank and step
    images: Optional[int] = MISSING  # of all ranks in a repeat where nothing is trained; null: a batch of each rank
    text_length: int = MISSING  # tokens of made-up captions, prompts and questions with their prompts
    questions: int = MISSING  # about each made-up image
    new_tokens: Optional[int] = MISSING  # that every written text has, no more and no less; null: the task's max_new_tokens
    num_beams: Optional[int] = MISSING  # null: the task's
    warmup: int = MISSING  # steps before those that count
    repeats: int = MISSING  # steps that count, each once with timers inside and once without
    matmul_sizes: List[int] = MISSING  # sides of the square matrices whose quickest product is the machine's peak
    curves: List[str] = MISSING  # which of task.sizes are measured, e.g. [batch,image_tokens]
    sizes: SizesConfig = field(default_factory=SizesConfig)
    overrides: List[str] = MISSING  # of each task in task.of, as on the command line, e.g. "task.accumulate=2"
    words: Optional[List[str]] = MISSING  # the other overrides; null: those of this command line


@schema("task", "audit")
@dataclass
class AuditConfig(TaskConfig):
    """Look the data set over; no model is built, and no weights are needed."""

    kind: str = "audit"
    open_images: Any = MISSING  # all, or how many of each split, drawn by lot; 0: none, so that copies are not found
    near: int = MISSING  # bits, of 64, in which hashes of pictures that look the same may differ
    max_txt_len: int = MISSING  # tokens, as in the training that is to be: what is longer is cut off there
    sheet: int = MISSING  # pictures of each split that the page shows


@schema("task", "compare")
@dataclass
class CompareConfig(TaskConfig):
    """Set runs beside one another: what differed, what came out, which is best. `runs` says which."""

    kind: str = "compare"


@schema("task", "serve")
@dataclass
class ServeConfig(DecodingConfig):
    """Try a trained model in a browser or over HTTP; decoding is as set here where a request does not say otherwise."""

    kind: str = "serve"
    stage: int = MISSING  # 1: captions from the Q-Former alone; 2: captions and answers from the language model
    prompt: str = MISSING  # of captions
    question_prompt: str = MISSING  # "{}" is replaced by the question
    answer_max_new_tokens: int = MISSING  # as max_new_tokens, of answers
    answer_length_penalty: float = MISSING  # as length_penalty, of answers
    host: str = MISSING  # address to listen on; 127.0.0.1: this machine only, 0.0.0.0: everybody who can reach it
    port: int = MISSING  # 0: any that is free
    max_queue: int = MISSING  # requests at a time, the one that is worked on included
    max_seconds: float = MISSING  # for a request, from its arrival to its answer
    max_upload_mb: float = MISSING  # of a picture
    max_images: int = MISSING  # encoded ones that are kept to be asked about
    max_images_mb: float = MISSING  # their memory
    limit_new_tokens: int = MISSING  # the most that a request may ask for as max_new_tokens
    limit_prompt_tokens: int = MISSING  # of a prompt, in OPT also what its positions leave; history that is older is left out
    limit_beams: int = MISSING  # the same of num_beams and num_return_sequences
