"""What one rank has in memory during a training step, from the config and a model without memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from paddle import Tensor, nn

from blip2x.config.model import ModelConfig
from blip2x.config.run import HybridConfig, PrecisionName, RunConfig
from blip2x.config.task import PretrainStage1Config
from blip2x.models.memory.ghosts import Tracer
from blip2x.models.memory.objectives import Answering, Extent, Language, Objective, Stage1, Stage2, Vision
from blip2x.parallel.degrees import Degrees, resolve_degrees
from blip2x.parallel.sharding import SEGMENT_SIZE, can_be_cut
from blip2x.parallel.strategies.hybrid import check_sharding

FULL = 4  # bytes of a float32, in which everything is that is trained
LIBRARIES = 380 * 2**20  # resident size of a process that has imported paddle and trained a tiny model
LANGUAGE_LIBRARIES = 230 * 2**20  # paddlenlp beside it
RESERVE = 150 * 2**20  # what the C library asks the system for ahead of need, see blip2x/startup.py
GAPS = 0.5  # of the activations' bytes: where blocks were freed and others did not fit; estimated from 1.3 to 15 GiB
PARTS = ("vision", "ln_vision", "qformer", "heads", "language")
LOW_TYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Layout:
    """How ranks share the work."""

    degrees: Degrees
    sharding_stage: int = 0
    tp_vision: bool = False

    @classmethod
    def of(cls, cfg: RunConfig, world_size: int) -> Layout:
        """The one of `cfg`, on `world_size` ranks.

        Raises:
            UserError: the degrees do not make that many ranks, or contradict the sharding stage.
        """
        parallelism = cfg.parallelism
        if not isinstance(parallelism, HybridConfig):
            return cls(resolve_degrees(1, 1, 1, world_size))
        degrees = resolve_degrees(parallelism.dp, parallelism.sharding, parallelism.tp, world_size)
        check_sharding(parallelism.sharding_stage, degrees, "gpu")  # what a CPU cannot do can be predicted on one
        return cls(degrees, parallelism.sharding_stage, parallelism.tp_vision)

    @property
    def data_ranks(self) -> int:
        """Ranks with different samples."""
        return self.degrees.dp * self.degrees.sharding

    def ranks_of(self, part: str) -> int:
        """Ranks that share the matrices of `part`, where that is frozen."""
        return self.degrees.tp if part == "language" or (part == "vision" and self.tp_vision) else 1


@dataclass(frozen=True)
class Part:
    """One part of the model on this rank: numbers, and bytes."""

    name: str
    parameters: int
    trained: int
    types: tuple[str, ...]
    weights: int
    gradients: int
    optimizer: int
    activations: int  # at the fullest moment

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Prediction:
    """What a training step takes on one rank, in bytes.

    Attributes:
        parts: of the model.
        batch: the micro-batches of a step.
        where: the fullest moment, "qformer, backward".
        checkpoint: of a checkpoint on the disk.
        saving: in the first rank's host memory while a checkpoint is written.
        saves_in_background: the next steps come while it is written.
    """

    parts: tuple[Part, ...]
    batch: int
    where: str
    checkpoint: int
    saving: int
    saves_in_background: bool

    @property
    def kept(self) -> int:
        """Weights, gradients and the optimizer's state, which are there all the time."""
        return sum(part.weights + part.gradients + part.optimizer for part in self.parts)

    @property
    def activations(self) -> int:
        """Everything else at the fullest moment of going through the model and back."""
        return self.batch + sum(part.activations for part in self.parts)

    @property
    def peak(self) -> int:
        """Tensors at the fullest moment of a step."""
        return self.kept + self.activations

    @property
    def resident(self) -> int:
        """On a CPU, of the first rank's process: with its libraries, gaps, batches on their way, and what saving copies."""
        if self.saves_in_background:  # the copies are still there when the next step begins
            return self.beside + self.peak + self.saving
        return self.beside + self.kept + max(self.activations, self.saving)

    @property
    def resident_elsewhere(self) -> int:
        """The same of every other rank: the first one saves."""
        return self.beside + self.peak

    @property
    def beside(self) -> int:
        """Of these, what is neither tensors nor copies of them."""
        libraries = LIBRARIES + (LANGUAGE_LIBRARIES if self.parts[-1].name == "language" else 0)
        return libraries + RESERVE + round(GAPS * self.activations) + 2 * self.batch


def predict(
    cfg: RunConfig,
    model: nn.Layer,
    layout: Layout,
    *,
    length: int,
    output_length: int,
    vocab_sizes: Mapping[str, int],
    classes: Sequence[int] = (),
    question_length: int = 0,
) -> Prediction:
    """What a step of the training `cfg` takes.

    Args:
        cfg: its task is one that trains.
        model: as the task trains it, with its types and frozen parts and split over ranks; it may have no memory.
        layout: the ranks.
        length: tokens of a text; of what an encoder reads.
        output_length: tokens that an encoder-decoder writes.
        vocab_sizes: "qformer" and "language" -> words.
        classes: of each kind of label that an image encoder is fitted on.
        question_length: tokens of a question that the Q-Former reads.
    """
    shape = _as_trained(cfg.model, model)
    extent = Extent(
        cfg.task.batch_size,
        length,
        output_length,
        cfg.task.accumulate,
        layout.data_ranks,
        layout.ranks_of("language") if shape.language.frozen else 1,
        layout.ranks_of("vision") if shape.vision.frozen else 1,
        question_length,
    )
    objective = _objective(cfg, shape, model, extent, vocab_sizes, classes)
    objective.step()
    ledger = objective.t.ledger
    parts = tuple(_part(name, model, layout, round(ledger.at_peak[name])) for name in PARTS if _parameters(model, name))
    trained = sum(part.trained for part in parts)
    checkpoint = 3 * FULL * trained
    return Prediction(
        parts,
        batch=round(ledger.at_peak["batch"]),
        where=ledger.where,
        checkpoint=checkpoint,
        saving=checkpoint if cfg.task.save_in_background else 2 * FULL * trained,  # weights are copied one by one then
        saves_in_background=cfg.task.save_in_background,
    )


def _objective(
    cfg: RunConfig, shape: ModelConfig, model: nn.Layer, extent: Extent, vocab_sizes: Mapping[str, int], classes: Sequence[int]
) -> Objective:
    low = FULL if cfg.precision.name is PrecisionName.fp32 else FULL // 2
    language_size = min((_size(parameter) for _, parameter in _parameters(model, "language")), default=FULL)
    common = (Tracer(low=low, full=FULL), shape, extent, language_size, vocab_sizes)
    if isinstance(cfg.task, PretrainStage1Config):
        return Stage1(*common, cfg.task)
    if cfg.task.kind == "pretrain_vision":
        return Vision(*common, classes)
    return {"pretrain_language": Language, "vqa_finetune": Answering}.get(cfg.task.kind, Stage2)(*common)


def _as_trained(cfg: ModelConfig, model: nn.Layer) -> ModelConfig:
    """With `frozen` as it is in `model`: a part that is fitted alone is trained whatever the config says."""
    frozen = {}
    for name in ("vision", "language"):
        parameters = _parameters(model, name)
        is_frozen = all(parameter.stop_gradient for _, parameter in parameters) if parameters else True
        frozen[name] = replace(getattr(cfg, name), frozen=is_frozen)
    return replace(cfg, **frozen)


def _parameters(model: nn.Layer, part: str) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if _part_of(name, model) == part]


def _part_of(name: str, model: nn.Layer) -> str:
    """The row of the table that a parameter counts in; a language model that is fitted alone is all one part."""
    first = name.split(".")[0]
    if first in ("vision", "ln_vision", "qformer", "language"):
        return first
    return "heads" if hasattr(model, "vision") else "language"


def _part(name: str, model: nn.Layer, layout: Layout, activations: int) -> Part:
    sharing = layout.degrees.sharding
    cut = _cut(model) if layout.sharding_stage == 3 else set()
    # paddle.DataParallel keeps what it sends beside the gradients (measured with two processes)
    copies = 2 if layout.sharding_stage == 0 and layout.data_ranks * layout.degrees.tp > 1 else 1
    weights = gradients = optimizer = numbers = trained = 0
    types = set()
    for key, parameter in _parameters(model, name):
        count, size = math.prod(parameter.shape), _size(parameter)
        slices = sharing if key in cut else 1
        numbers += count
        types.add(str(parameter.dtype).split(".")[-1])
        weights += count * size // slices
        if parameter.stop_gradient:
            continue
        trained += count
        gradients += copies * count * FULL // (sharing if layout.sharding_stage == 2 else slices)
        optimizer += 2 * count * FULL // (sharing if layout.sharding_stage in (1, 2) else slices)
    return Part(name, numbers, trained, tuple(sorted(types)), weights, gradients, optimizer, activations)


def _cut(model: nn.Layer) -> set[str]:
    """Names of the parameters of which a rank keeps a slice in stage 3."""
    layers = model.named_sublayers(include_self=True)
    return {
        f"{name}.weight".lstrip(".")
        for name, layer in layers
        if can_be_cut(name, layer) and math.prod(layer.weight.shape) > SEGMENT_SIZE
    }


def _size(parameter: Tensor) -> int:
    return 2 if str(parameter.dtype).split(".")[-1] in LOW_TYPES else FULL
