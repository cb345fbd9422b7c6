"""Time and memory of one optimizer step on one kind of machine under one layout, for bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from blip2x.config.model import ModelConfig
from blip2x.config.task import PretrainStage1Config, TrainingConfig
from blip2x.models.flops import Count, Work, backward_flops, contrast_count, trained_parts, training_counts
from blip2x.models.memory.ghosts import Tracer
from blip2x.models.memory.objectives import Answering, Extent, Language, Objective, Stage1, Stage2, Vision
from blip2x.models.plan.assumptions import (
    LATENCY,
    LINK_USED,
    MEMORY_SPEED_USED,
    MEMORY_USED,
    OVERLAP,
    PICTURE_SECONDS,
    UPDATE_BYTES,
    Machine,
)
from blip2x.models.plan.parameters import Parameter, parameters, trained
from blip2x.models.plan.traffic import FULL, LOW, SEGMENT, Batch, Layout, Traffic, traffic

PARTS = ("vision", "qformer", "language")


@dataclass
class Training:
    """What is to be planned.

    Attributes:
        cfg: the model.
        task: the training; its batch size does not count.
        samples: of an optimizer step, over all ranks.
        length: tokens of a text, as of `flops.Work`.
        output_length: tokens that an encoder-decoder writes.
        question_length: tokens of a question that the Q-Former reads.
        vocab_sizes: "qformer" and "language" -> words, where the config leaves them to the tokenizer.
        classes: of each kind of label that an image encoder is fitted on.
        steps: of the whole training; None: not known.
        keeps_features: plan for epochs in which the frozen image encoder's outputs are on disk.
    """

    cfg: ModelConfig
    task: TrainingConfig
    samples: int
    length: int
    output_length: int = 0
    question_length: int = 0
    vocab_sizes: Mapping[str, int] = field(default_factory=dict)
    classes: Sequence[int] = ()
    steps: int | None = None
    keeps_features: bool = False
    _activations: dict[tuple[int, ...], int] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Of the model."""
        return parameters(self.cfg, self.task.kind, self.vocab_sizes, self.classes)

    @cached_property
    def trained(self) -> list[Parameter]:
        """Those that are changed."""
        return trained(self.cfg, self.task.kind, self.parameters)

    @cached_property
    def trained_parts(self) -> set[str]:
        """Of "vision", "qformer" and "language"."""
        return trained_parts(self.cfg, self.task.kind)

    @property
    def contrasts(self) -> bool:
        """Whether samples are compared with each other, those of all ranks."""
        return isinstance(self.task, PretrainStage1Config)

    @property
    def words(self) -> dict[str, int]:
        """Vocabulary sizes by part."""
        return {part: getattr(self.cfg, part).vocab_size or self.vocab_sizes.get(part, 0) for part in ("qformer", "language")}

    def batch(self, layout: Layout, accumulate: int) -> Batch:
        """A rank's part of a step, rounded up."""
        rows = math.ceil(self.samples / (layout.data_ranks * accumulate))
        return Batch(rows, self.length, self.output_length, self.question_length, accumulate)

    def task_for(self, accumulate: int) -> TrainingConfig:
        """The task with that many micro-batches, in which stage 1 still contrasts all of the step's pairs."""
        if not self.contrasts:
            return replace(self.task, accumulate=accumulate)
        return replace(self.task, accumulate=accumulate, cached_contrast=accumulate > 1)

    def operations(self, layout: Layout, batch: Batch) -> dict[str, tuple[float, float]]:
        """Of a step on one rank by part: forward, with what cached contrast looks ahead for, and all that comes after it."""
        found, cached = {}, self.contrasts and self.task_for(batch.accumulate).cached_contrast
        for part, count in self._counts(layout, batch).items():
            there, back = count.forward, backward_flops(part, count, self.trained_parts)
            if getattr(self.cfg, part).recompute and back:
                back += count.forward
            if cached and part == "qformer":
                there += contrast_count(self.cfg, batch.rows, batch.length).forward
            elif cached and part == "vision" and part in self.trained_parts:
                passes = 2 if self.task.itm_weight else 1  # of pictures, and of those that are their texts' negatives
                there, back = (1 + passes) * there, passes * back  # the look ahead goes no way back
            share = layout.degrees.tp if part == "language" else 1
            found[part] = (there * batch.accumulate / share, back * batch.accumulate / share)
        return found

    def needed(self, layout: Layout, batch: Batch) -> float:
        """Of a step on one rank without what is done twice: for memory's sake, for cached contrast, by tensor ranks."""
        counts = self._counts(layout, batch)
        needed = sum(count.forward + backward_flops(part, count, self.trained_parts) for part, count in counts.items())
        return needed * batch.accumulate / layout.degrees.tp

    def _counts(self, layout: Layout, batch: Batch) -> dict[str, Count]:
        """Of a micro-batch of the ranks that share its samples."""
        work = Work(0 if self.keeps_features else batch.rows, batch.rows, batch.length, batch.output_length)
        return training_counts(
            self.cfg,
            self.task.kind,
            work,
            data_ranks=layout.data_ranks * batch.accumulate,
            question_tokens=batch.question_length,
            vocab_sizes=self.vocab_sizes,
            classes=self.classes,
        )

    def activations(self, layout: Layout, batch: Batch) -> int:
        """Bytes at the fullest moment of going through the model and back, as blip2x/models/memory works them out."""
        ranks = layout.data_ranks if self.contrasts else 1
        key = (batch.rows, batch.accumulate, ranks, layout.degrees.tp)
        if key not in self._activations:
            extent = Extent(
                batch.rows,
                batch.length,
                batch.output_length,
                batch.accumulate,
                ranks,
                layout.degrees.tp,
                1,
                batch.question_length,
            )
            objective = self._objective(extent)
            objective.step()
            self._activations[key] = round(objective.t.ledger.peak)
        return self._activations[key]

    def bytes_per_row(self, layout: Layout) -> float:
        """Of activations, as far as it is known already, 0 if it is not: of the largest batch that was gone through.

        Where samples are compared over ranks it depends on how many these are, and is not said.
        """
        known = [(rows, size / rows) for (rows, *_, tp), size in self._activations.items() if tp == layout.degrees.tp]
        return max(known)[1] if known and not self.contrasts else 0.0

    def _objective(self, extent: Extent) -> Objective:
        frozen = {
            part: replace(getattr(self.cfg, part), frozen=part not in self.trained_parts) for part in ("vision", "language")
        }
        shape = replace(self.cfg, **frozen)
        language_size = LOW if shape.language.frozen else FULL
        common = (Tracer(low=LOW, full=FULL), shape, extent, language_size, self.words)
        if self.contrasts:
            return Stage1(*common, self.task_for(extent.accumulate))
        if self.task.kind == "pretrain_vision":
            return Vision(*common, self.classes)
        return {"pretrain_language": Language, "vqa_finetune": Answering}.get(self.task.kind, Stage2)(*common)

    def kept(self, layout: Layout) -> int:
        """Bytes of weights, gradients and AdamW's moments on one rank."""
        sharing, total = layout.degrees.sharding, 0.0
        for parameter in self.parameters:
            is_trained = parameter.part in self.trained_parts
            size = parameter.numbers * (FULL if is_trained else LOW)
            if parameter.part == "language" and not is_trained:
                size /= layout.degrees.tp
            if not is_trained:
                total += size
                continue
            cut = sharing if layout.stage == 3 and parameter.linear and parameter.numbers > SEGMENT else 1
            copies = 2 if layout.stage == 0 and layout.ranks > 1 else 1  # paddle keeps what it sends
            gradient = copies * size / (sharing if layout.stage == 2 else cut)
            moments = 2 * size / (sharing if layout.stage in (1, 2) else cut)
            total += size / cut + gradient + moments
        return round(total)

    def read_weights(self, part: str, layout: Layout) -> float:
        """Bytes of a part's weights on one rank."""
        size = FULL if part in self.trained_parts else LOW
        share = layout.degrees.tp if part == "language" and part not in self.trained_parts else 1
        return sum(parameter.numbers for parameter in self.parameters if parameter.part == part) * size / share

    def traffic(self, layout: Layout, batch: Batch, *, low: int = LOW) -> list[Traffic]:
        """What a rank exchanges in a step."""
        task = self.task_for(batch.accumulate)
        return traffic(self.cfg, task, layout, batch, self.trained, low=low, vocab_sizes=self.words)


@dataclass(frozen=True)
class Estimate:
    """A step on one machine under one layout; seconds, and bytes of one GPU.

    Attributes:
        layout: of the ranks.
        batch: of one rank.
        forward: products of the way there, or their weights' way from memory where that takes longer.
        backward: the same of all that comes after.
        update: of the optimizer.
        sending: that nothing hides.
        overhead: in which nothing is computed.
        sent: bytes that leave or enter a GPU, the larger of both.
        memory: at the fullest moment.
        peak_share: of the machine's peak, by operations that are needed.
        cores: of a node, busy with pictures.
    """

    layout: Layout
    batch: Batch
    forward: float
    backward: float
    update: float
    sending: float
    overhead: float
    sent: float
    memory: int
    peak_share: float
    cores: float

    @property
    def step(self) -> float:
        """Seconds."""
        return self.forward + self.backward + self.update + self.sending + self.overhead

    @property
    def samples(self) -> int:
        """Of a step, all ranks together; more than was asked for where it does not divide evenly."""
        return self.batch.samples * self.layout.data_ranks

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together."""
        return self.samples / self.step


def estimate(training: Training, machine: Machine, layout: Layout, accumulate: int, *, memory: bool = True) -> Estimate:
    """What a step takes; `accumulate` micro-batches of a rank. Without `memory` that is left at 0, which is much quicker."""
    batch = training.batch(layout, accumulate)
    operations = training.operations(layout, batch)
    forward = backward = hiding = 0.0
    for part, (there, back) in operations.items():
        speed = machine.peak * machine.utilisation[part]
        reading = accumulate * training.read_weights(part, layout) / (machine.memory_speed * MEMORY_SPEED_USED)
        forward += max(there / speed, reading) if there else 0
        spent = max(back / speed, reading) if back else 0
        backward += spent
        if part in training.trained_parts:
            hiding += OVERLAP * spent / accumulate  # sums begin with the last micro-batch's first gradients
    update = update_seconds(training, machine, layout)
    exchanged = [(one, *wire(one, machine, layout)) for one in training.traffic(layout, batch)]
    hidden = sum(seconds for one, _, seconds in exchanged if one.hidden)
    sending = sum(seconds for one, _, seconds in exchanged if not one.hidden) + max(0.0, hidden - hiding)
    step = forward + backward + update + sending + machine.overhead
    pictures = training.task.kind != "pretrain_language" and not training.keeps_features
    per_node = min(machine.node, layout.ranks) / layout.degrees.tp * batch.samples / step
    return Estimate(
        layout,
        batch,
        forward,
        backward,
        update,
        sending,
        machine.overhead,
        sum(size for _, size, _ in exchanged),
        training.kept(layout) + training.activations(layout, batch) if memory else 0,
        training.needed(layout, batch) / (step * machine.peak),
        per_node * picture_seconds(training) if pictures else 0.0,
    )


def update_seconds(training: Training, machine: Machine, layout: Layout) -> float:
    """AdamW's way through memory."""
    sharing, numbers = layout.degrees.sharding, sum(parameter.numbers for parameter in training.trained)
    if layout.stage in (1, 2):
        numbers /= sharing
    elif layout.stage == 3:
        cut = sum(p.numbers for p in training.trained if p.linear and p.numbers > SEGMENT)
        numbers += cut / sharing - cut
    return numbers * UPDATE_BYTES / (machine.memory_speed * MEMORY_SPEED_USED)


def wire(one: Traffic, machine: Machine, layout: Layout) -> tuple[float, float]:
    """Bytes that go through a GPU's link one way, and seconds, by rings (Patarasuk and Yuan, 2009).

    To one rank, or from one, all bytes go through each link that is used; ranks take turns as that one, call after call.
    """
    count = layout.sizes()[one.group]
    factor = {"all_reduce": 2 * (count - 1) / count, "all_gather": count - 1, "reduce": 1, "broadcast": 1}[one.operation]
    size = factor * one.bytes
    return size, size / speed(one.group, machine, layout) + one.calls * LATENCY * max(1.0, math.log2(count))


def speed(group: str, machine: Machine, layout: Layout) -> float:
    """Bytes per second between neighbours of a ring: inside a node, or out of it by the cards of all its members there."""
    own = layout.degrees
    apart = {"tensor": 1, "all": 1, "data": own.tp, "sharding": own.tp, "copies": own.tp * own.sharding}[group]
    span = apart * layout.sizes()[group]
    if span <= machine.node:
        return machine.inside * LINK_USED
    members = max(1, machine.node // apart)
    return min(machine.inside, members * machine.outside) * LINK_USED


def picture_seconds(training: Training) -> float:
    """CPU seconds of one training picture; other sizes by the number of pixels of the nearest one that was measured."""
    side = training.cfg.vision.image_size
    known = min(PICTURE_SECONDS, key=lambda other: abs(other - side))
    return PICTURE_SECONDS[known]


def fits(found: Estimate, machine: Machine) -> bool:
    """Whether the tensors of a step have room."""
    return found.memory <= machine.memory * MEMORY_USED
