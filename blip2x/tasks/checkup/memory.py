"""How much memory a training will take, part by part, before anything is trained; neither weights nor pictures are needed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import paddle
from paddle import nn

from blip2x.config.run import PrecisionName, RunConfig
from blip2x.config.task import DecodingConfig, PretrainStage1Config, PretrainStage2Config, WeightsType, weights_dtype
from blip2x.config.tools import ExtractFeaturesConfig
from blip2x.data.collate import QuestionTexts
from blip2x.data.tokenize import TextTokenizer, build_tokenizer
from blip2x.engine.memory import free_memory
from blip2x.engine.memory_table import amount, lines, markdown
from blip2x.errors import UserError
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.models.assemblies.stage1 import build_stage1
from blip2x.models.assemblies.stage2 import build_stage2
from blip2x.models.freeze import freeze
from blip2x.models.memory.predict import Layout, Prediction, predict
from blip2x.models.precision import storage_types, store_compact, store_in
from blip2x.models.tensor_parallel import check_split
from blip2x.models.weights.known import locate_tokenizer
from blip2x.parallel.context import TensorGroup
from blip2x.parallel.devices import started_processes
from blip2x.parallel.strategies.hybrid import check_sharding
from blip2x.registry import LANGUAGE_MODELS, VISION_ENCODERS
from blip2x.tasks.checkup.findings import INDENT, Findings
from blip2x.tasks.common.inputs import build_source

if TYPE_CHECKING:
    from blip2x.tasks.checkup.examined import Examined

_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int64": 8, "float64": 8}  # bytes


@dataclass(frozen=True)
class Texts:
    """What is known of the texts without reading a batch: lengths in tokens, and vocabularies."""

    length: int
    output_length: int
    vocab_sizes: Mapping[str, int]
    question_length: int = 0  # of what the Q-Former reads beside the image


class Longest(NamedTuple):
    """Tokens of a data set's longest texts, without what begins and ends them."""

    document: int
    line: int  # of a document
    caption: int


def stage_of(cfg: RunConfig) -> str | None:
    """The model that a task has: "vision", "language", "stage1", "stage2" or "answering"; None: it builds none."""
    task, alone = cfg.task, {"pretrain_vision": "vision", "pretrain_language": "language", "vqa_finetune": "answering"}
    if task.kind in alone:
        return alone[task.kind]
    if isinstance(task, (PretrainStage1Config, ExtractFeaturesConfig)) or getattr(task, "stage", 2) == 1:
        return "stage1"
    return "stage2" if isinstance(task, (PretrainStage2Config, DecodingConfig)) else None


def check_memory(examined: Examined) -> Findings:
    """Predict what a step of a training takes, and write it to memory.json and memory.md; of the others, the weights alone."""
    out = Findings(examined.name)
    free, where = free_memory(examined.device)
    if not examined.trains:
        stored = stored_bytes(examined.model)
        said = f"{amount(stored)} of weights, {amount(free)} free {where}; batches come on top of that"
        if stored > free:
            smaller = isinstance(examined.cfg.task, DecodingConfig) and weights_dtype(examined.cfg.task) is not WeightsType.int8
            advice = "set task.weights_dtype=int8, or " if smaller else ""
            advice += "choose a smaller model, or precision=bf16 on a GPU"
            out.broken("memory", said, advice)
        else:
            out.fine("memory", said)
        return out
    cfg, layout, (found, _) = examined.cfg, examined.layout, examined.predicted
    lacking = gpu_reason(cfg, layout) if examined.device == "cpu" else None
    need, whose = needed(found, examined.device, ranks_here(rank_count(layout), os.environ))
    judged = no_verdict(found, lacking) if lacking else verdict(need, whose, free, where)
    said = sentences(cfg, found, layout, examined.texts)
    title = f"{examined.name}, {ranks(layout)}: memory of one rank"
    console = examined.run.console
    out.shown = [title, *lines(found, console.width - INDENT if console.is_terminal else None), *said]
    elsewhere = rank_count(layout) != started_processes()  # only asked about: perhaps for another machine
    add = out.look if lacking or (elsewhere and need > free) else out.fine if need <= free else out.broken
    add("memory", judged)
    compared = None if lacking else free
    out.record = {"memory": {**asdict(found), "peak": found.peak, "resident": found.resident, "free": compared}}
    out.page = markdown(examined.name, found, [*said, judged])
    return out


def stored_bytes(model: nn.Layer) -> int:
    """What its weights take, in the types that they are stored in."""
    return sum(math.prod(p.shape) * _SIZES[str(p.dtype).removeprefix("paddle.")] for p in model.parameters())


def prediction_of(cfg: RunConfig, layout: Layout, texts: Texts) -> tuple[Prediction, nn.Layer]:
    """What a step of `cfg` takes, and the model that it was worked out for, without memory."""
    classes = label_classes(cfg)
    model = model_of(cfg, layout, texts.vocab_sizes, classes)
    lengths = {
        "length": texts.length,
        "output_length": texts.output_length,
        "question_length": texts.question_length,
    }
    found = predict(cfg, model, layout, **lengths, vocab_sizes=texts.vocab_sizes, classes=list(classes.values()))
    return found, model


def label_classes(cfg: RunConfig) -> dict[str, int]:
    """Kinds of labels, where the training has any."""
    return dict(build_source(cfg).label_classes) if cfg.task.kind == "pretrain_vision" else {}


def ranks_here(world_size: int, started: Mapping[str, str]) -> int:
    """How many of `world_size` ranks share this machine: as the launcher's variables `started` say; without them all."""
    endpoints = started.get("PADDLE_TRAINER_ENDPOINTS", "").split(",")
    if len(endpoints) != world_size:  # not the ranks that are asked about
        return world_size
    here = started.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    return sum(endpoint.rpartition(":")[0] == here for endpoint in endpoints) or world_size


def model_of(cfg: RunConfig, layout: Layout, vocab_sizes: Mapping[str, int], classes: Mapping[str, int]) -> nn.Layer:
    """The model that `cfg` has, as the rank 0 of `layout` holds it, without memory.

    Raises:
        UserError: a part cannot be split over the ranks.
    """
    stage, shape = stage_of(cfg), cfg.model
    with paddle.LazyGuard():
        if stage == "vision":
            return PatchClassifier(VISION_ENCODERS.get(shape.vision.kind)(shape.vision), classes)
        if stage == "language":
            return LANGUAGE_MODELS.get(shape.language.kind)(shape.language, vocab_sizes["language"])
        if stage == "stage1":
            model = build_stage1(shape, vocab_size=vocab_sizes["qformer"])
        else:
            questions = vocab_sizes["qformer"] if stage == "answering" else None
            model = build_stage2(shape, vocab_size=vocab_sizes["language"], question_vocab_size=questions)
    types = storage_types(cfg.precision.name, shape)
    for name in ("vision", "language"):
        part = getattr(model, name, None)
        if part is None:
            continue
        size = layout.ranks_of(name)
        if size > 1:
            check_split(shape, name, size)
            part.split_over(TensorGroup(0, size))
        if types[name] != "float32":
            store_in(part, types[name])
        store_compact(part, weights_dtype(cfg.task), types[name])
        if getattr(shape, name).frozen:
            freeze(part)
    return model


def texts_of(cfg: RunConfig) -> Texts:
    """Vocabularies, and the lengths of the longest texts.

    Where the vocabulary is the data set's words, these are read, and its longest texts are found. Else nothing is read, and
    texts count as long as they are allowed to be.
    """
    kind, shape, limit = cfg.task.kind, cfg.model, getattr(cfg.task, "max_txt_len", 0)
    if kind == "vqa_finetune":
        return _texts_with_questions(cfg)
    vocab_sizes = {"qformer": shape.qformer.vocab_size or 0, "language": shape.language.vocab_size or 0}
    if stage_of(cfg) in ("vision", "stage1"):
        if kind != "pretrain_vision" and not vocab_sizes["qformer"]:
            vocab_sizes["qformer"] = _tokenizer(cfg, "qformer", "bert").vocab_size
        return Texts(limit, 0, vocab_sizes)  # at most
    tokenizer = None if vocab_sizes["language"] else _tokenizer(cfg, "language", shape.language.kind)
    if tokenizer:
        vocab_sizes["language"] = tokenizer.vocab_size
    longest = _longest(cfg, tokenizer) if tokenizer and shape.language.tokenizer == "dataset" else Longest(limit, limit, limit)
    prompt = getattr(cfg.task, "prompt", "")
    prompt_tokens = len(tokenizer.tokens(prompt)) if tokenizer else 2 * len(prompt.split())
    if shape.language.kind != "t5":  # one text with what begins and ends it
        text = longest.document if kind == "pretrain_language" else prompt_tokens + longest.caption
        return Texts(min(limit, text + 2), 0, vocab_sizes)
    # two texts with their ends: what is read and what is written
    if kind == "pretrain_language":
        read, written = longest.document, longest.line
    else:
        split = getattr(cfg.task, "prefix_split", False)
        read, written = prompt_tokens + (longest.caption - 1 if split else 0), longest.caption
    return Texts(min(limit, read + 1), min(limit, written + 1), vocab_sizes)


def _texts_with_questions(cfg: RunConfig) -> Texts:
    """`texts_of` where a model is fine-tuned on questions."""
    limit, families = cfg.task.max_txt_len, {"qformer": "bert", "language": cfg.model.language.kind}
    parts = {name: getattr(cfg.model, name) for name in families}
    tokenizers = {name: _tokenizer(cfg, name, families[name]) for name, part in parts.items() if not part.vocab_size}
    vocab_sizes = {name: tokenizers[name].vocab_size if name in tokenizers else part.vocab_size for name, part in parts.items()}
    if len(tokenizers) < len(parts) or any(part.tokenizer != "dataset" for part in parts.values()):
        return Texts(limit, limit if families["language"] == "t5" else 0, vocab_sizes, limit)
    texts = QuestionTexts(tokenizers["qformer"], tokenizers["language"], cfg.task.prompt, limit, clean=cfg.task.clean_questions)
    samples = build_source(cfg).questions("train")
    questions, answers = [sample.question for sample in samples], [max(sample.answers, key=len) for sample in samples]
    arrays = {**texts.asked(questions), **texts.answered(questions, answers)}
    lengths = {name: array.shape[1] for name, array in arrays.items() if "_ids_" in name}
    read = lengths["input_ids_BL" if families["language"] == "t5" else "text_ids_BL"]
    return Texts(read, lengths.get("output_ids_BT", 0), vocab_sizes, lengths["question_ids_BK"])


def _longest(cfg: RunConfig, tokenizer: TextTokenizer) -> Longest:
    source = build_source(cfg)
    documents = source.texts()
    lines = [line for text in documents for line in text.splitlines()]
    captions = [] if cfg.task.kind == "pretrain_language" else source.captions("train")
    texts = (documents, lines, [caption for sample in captions for caption in sample.captions])
    return Longest(*(max((len(tokenizer.tokens(text)) for text in kind), default=0) for kind in texts))


def _tokenizer(cfg: RunConfig, part: str, family: str) -> TextTokenizer:
    paths, key = cfg.paths, f"model.{part}.tokenizer"
    return build_tokenizer(
        getattr(cfg.model, part).tokenizer,
        family,
        locate=lambda name: locate_tokenizer(name, Path(paths.weights), offline=paths.offline, key=key),
        dataset_texts=lambda: build_source(cfg).texts(),
    )


def sentences(cfg: RunConfig, found: Prediction, layout: Layout, texts: Texts) -> list[str]:
    """What the table does not say."""
    task = cfg.task
    batch = f"{task.batch_size} samples" + (f" x {task.accumulate} micro-batches" if task.accumulate > 1 else "")
    lengths = " and ".join(str(length) for length in (texts.length, texts.output_length, texts.question_length) if length)
    counted = [f"{batch} per rank", *([f"texts of {lengths} tokens"] if lengths else [])]
    counted += [f"{cfg.model.vision.image_size} pixels", cfg.precision.name.value, ranks(layout)]
    said = [
        f"Highest: {amount(found.peak)} of tensors, in this part and pass: {found.where}.",
        f"Counted with {', '.join(counted)}.",
        f"A checkpoint takes {amount(found.checkpoint)} on the disk, trained weights and the optimizer's state; up to "
        f"{task.keep_last + task.keep_best} are kept. While one is written, the first rank's host memory has copies of "
        f"{amount(found.saving)} more.",
    ]
    if cfg.precision.name is PrecisionName.fp32:
        said.append(
            f"On a CPU the first rank's process takes {amount(found.resident)} with what it copies for saving; "
            f"{amount(found.beside)} of it are libraries, gaps between tensors and batches on their way."
        )
    else:
        said.append("Half precision and GPU kernels have not been measured; attention counts as if it were not fused.")
    return said


def gpu_reason(cfg: RunConfig, layout: Layout) -> str | None:
    """What of `cfg` cannot be done on a CPU; None: all can."""
    if cfg.precision.name is not PrecisionName.fp32:
        return f"precision={cfg.precision.name.value}"
    try:
        check_sharding(layout.sharding_stage, layout.degrees, "cpu")
    except UserError:
        return f"the layout of {ranks(layout)}"
    return None


def needed(found: Prediction, device: str, ranks: int) -> tuple[int, str]:
    """Bytes of what has to fit into the memory of `device`, and who needs them: on a CPU all `ranks` of this machine."""
    if device != "cpu":
        return found.peak, "a rank"
    whose = "a rank" if ranks == 1 else f"{ranks} ranks, all on this machine"
    return found.resident + (ranks - 1) * found.resident_elsewhere, whose


def verdict(need: int, whose: str, free: int, where: str) -> str:
    """Whether it fits."""
    numbers = f"{amount(need)} needed by {whose}, {amount(free)} free {where}"
    if need <= free:
        return f"It fits: {numbers}."
    advice = "lower task.batch_size (task.accumulate makes up for it), or set a part's recompute=true"
    return f"It does not fit: {numbers}; {advice}."


def no_verdict(found: Prediction, reason: str) -> str:
    """What is said without a GPU about what needs one."""
    return f"No verdict, for {reason} needs GPUs and there is none here: each rank's has to have {amount(found.peak)} free."


def rank_count(layout: Layout) -> int:
    """On all machines."""
    return layout.degrees.dp * layout.degrees.sharding * layout.degrees.tp


def ranks(layout: Layout) -> str:
    """How many, and how they share the work."""
    degrees, count = layout.degrees, rank_count(layout)
    if count == 1:
        return "1 rank"
    stage = f", stage {layout.sharding_stage}" if layout.sharding_stage else ""
    return f"{count} ranks (dp {degrees.dp}, sharding {degrees.sharding}{stage}, tp {degrees.tp})"
