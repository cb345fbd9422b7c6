"""What a rank hands to each exchange between ranks in an optimizer step, byte for byte as the code does it.

B pairs of a micro-batch, K pairs of all data ranks, Q queries, P patches, L text tokens, S = Q + L, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blip2x.config.model import ModelConfig
from blip2x.config.task import PretrainStage1Config, TrainingConfig
from blip2x.models.flops import patches
from blip2x.models.plan.parameters import Parameter
from blip2x.parallel.degrees import Degrees

FULL, LOW, ID = 4, 2, 8  # bytes of a float32, of a bfloat16, of an int64
SEGMENT = 2**20  # as blip2x.parallel.sharding.SEGMENT_SIZE: stage 3 cuts what has more numbers
BUCKET = 25 * 2**20  # bytes of gradients that paddle.DataParallel sends at a time
PASSES = 4  # times that stage 1 calls a text's feed-forward for a micro-batch: text, own pairs, others, caption; others fewer


@dataclass(frozen=True)
class Layout:
    """How ranks share the work; as `parallelism.dp`, `.sharding`, `.sharding_stage` and `.tp`."""

    degrees: Degrees
    stage: int = 0

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data_ranks * self.degrees.tp

    @property
    def data_ranks(self) -> int:
        """Ranks with different samples."""
        return self.degrees.dp * self.degrees.sharding

    def sizes(self) -> dict[str, int]:
        """Ranks of each kind of group; "copies" keep the same share of what sharding divides."""
        own = self.degrees
        return {"all": self.ranks, "data": self.data_ranks, "sharding": own.sharding, "tensor": own.tp, "copies": own.dp}


@dataclass(frozen=True)
class Batch:
    """A rank's part of a step: rows of a micro-batch, how many there are, and tokens as of `flops.Work`."""

    rows: int
    length: int
    output_length: int = 0
    question_length: int = 0
    accumulate: int = 1

    @property
    def samples(self) -> int:
        """Of all micro-batches."""
        return self.rows * self.accumulate


@dataclass(frozen=True)
class Traffic:
    """One kind of exchange in a step.

    Attributes:
        name: for readers.
        operation: all_gather, all_reduce, reduce or broadcast.
        group: as in `Layout.sizes`.
        bytes: that a rank hands in, of all calls.
        calls: how often.
        hidden: it goes on beside the way back.
    """

    name: str
    operation: str
    group: str
    bytes: int
    calls: int = 1
    hidden: bool = False


def traffic(
    cfg: ModelConfig,
    task: TrainingConfig,
    layout: Layout,
    batch: Batch,
    trained: Sequence[Parameter],
    *,
    low: int,
    vocab_sizes: Mapping[str, int],
) -> list[Traffic]:
    """All exchanges of a step but scalars of logging; `low` is the size of the numbers of products, `FULL` in fp32."""
    contrasts = isinstance(task, PretrainStage1Config)
    gathers = 2 * (PASSES if contrasts else 1)  # of a matrix that is cut: on the way there and on the way back
    gathers += contrasts and task.cached_contrast  # a look ahead at the texts, from which nothing goes back
    found = [*_gradients(layout, trained, batch.accumulate, gathers)]
    if contrasts:
        found += _pairs(cfg, task, layout, batch)
    elif layout.degrees.tp > 1 and task.kind not in ("pretrain_vision", "pretrain_language"):
        read = _opt if cfg.language.kind == "opt" else _t5
        found += [_times(one, batch.accumulate) for one in read(cfg, batch, layout.degrees.tp, low, vocab_sizes["language"])]
    if task.kind != "pretrain_vision":
        found.append(Traffic("counts of tokens", "all_reduce", "data", FULL))
    sizes = layout.sizes()
    return [one for one in found if sizes[one.group] > 1 and one.calls]


def _times(one: Traffic, times: int) -> Traffic:
    return Traffic(one.name, one.operation, one.group, one.bytes * times, one.calls * times, one.hidden)


def _gradients(layout: Layout, trained: Sequence[Parameter], micro: int, gathers: int) -> Iterator[Traffic]:
    """Stages 2 and 3 do not wait for the last of `micro` micro-batches, as no rank keeps whole gradients."""
    numbers, count, sharing = sum(parameter.numbers for parameter in trained), len(trained), layout.degrees.sharding
    if layout.stage == 0:
        yield Traffic("gradients", "all_reduce", "all", numbers * FULL, math.ceil(numbers * FULL / BUCKET), hidden=True)
    elif layout.stage in (1, 2):
        times = micro if layout.stage == 2 else 1
        yield Traffic("gradients", "reduce", "sharding", times * numbers * FULL, times * count)
        yield Traffic("weights", "broadcast", "sharding", numbers * FULL, count)
        for group in ("copies", "tensor"):
            yield Traffic("gradients", "all_reduce", group, numbers * FULL // sharing, math.ceil(count / sharing))
    else:
        cut = [parameter.numbers for parameter in trained if parameter.linear and parameter.numbers > SEGMENT]
        whole, gathers = (numbers - sum(cut)) * FULL, gathers * micro
        yield Traffic("gradients", "all_reduce", "sharding", micro * sum(cut) * FULL + whole, micro * len(cut) + 1)
        yield Traffic("weights", "all_gather", "sharding", gathers * sum(cut) * FULL // sharing, gathers * len(cut))
        for group in ("copies", "tensor"):
            yield Traffic("gradients", "all_reduce", group, whole + sum(cut) * FULL // sharing, 1 + len(cut))


def _pairs(cfg: ModelConfig, task: PretrainStage1Config, layout: Layout, batch: Batch) -> Iterator[Traffic]:
    """Stage 1: every rank sees the features, the images and the texts of all; gradients come back for all pairs."""
    samples, own, micro, trains_vision = batch.samples, cfg.qformer, batch.accumulate, not cfg.vision.frozen
    together = 1 if task.cached_contrast else micro  # times that a step contrasts
    features = samples * (own.num_queries + 1) * own.embed_dim * FULL
    yield Traffic("features", "all_gather", "data", features, 2 * together)
    yield Traffic("numbers of images", "all_gather", "data", samples * ID, together)
    if task.gather_gradient:
        yield Traffic("features, back", "all_reduce", "data", layout.data_ranks * features, 2 * together)
    if not task.itm_weight:
        return
    length = max(batch.length, task.max_txt_len)  # ranks do not know each other's lengths
    yield Traffic("texts", "all_gather", "data", 2 * samples * length * ID, 2 * micro)
    if trains_vision and task.cached_contrast:
        yield Traffic("pictures", "all_gather", "data", samples * 3 * cfg.vision.image_size**2 * FULL, micro)
        return
    encoded = samples * patches(cfg.vision) * cfg.vision.width * FULL
    yield Traffic("patches", "all_gather", "data", encoded, micro)
    if trains_vision:
        yield Traffic("patches, back", "all_reduce", "data", layout.data_ranks * encoded, micro)


def _opt(cfg: ModelConfig, batch: Batch, tp: int, low: int, words: int) -> Iterator[Traffic]:
    """Two sums per layer on the way there, as many back; the words' rows, and their part of the logits that predict."""
    own, length = cfg.language, cfg.qformer.num_queries + batch.length
    hidden, predicted = batch.rows * length * own.width, batch.rows * (batch.length - 1)  # all but bos
    yield Traffic("embeddings", "all_reduce", "tensor", batch.rows * batch.length * own.width * low)
    yield Traffic("layers", "all_reduce", "tensor", 2 * own.depth * hidden * low, 2 * own.depth)
    yield Traffic("layers, back", "all_reduce", "tensor", 2 * own.depth * hidden * low, 2 * own.depth)
    yield Traffic("norm, back", "all_reduce", "tensor", predicted * own.width * low)
    yield Traffic("logits", "all_gather", "tensor", predicted * math.ceil(words / tp) * low)


def _t5(cfg: ModelConfig, batch: Batch, tp: int, low: int, words: int) -> Iterator[Traffic]:
    own, length = cfg.language, cfg.qformer.num_queries + batch.length
    read, written = batch.rows * length * own.width, batch.rows * batch.output_length * own.width
    yield Traffic("embeddings", "all_reduce", "tensor", (batch.rows * batch.length * own.width + written) * low, 2)
    yield Traffic("encoder", "all_reduce", "tensor", 2 * own.encoder_depth * read * low, 2 * own.encoder_depth)
    yield Traffic("encoder, back", "all_reduce", "tensor", (2 * own.encoder_depth + 1) * read * low, 2 * own.encoder_depth + 1)
    yield Traffic("decoder", "all_reduce", "tensor", 3 * own.decoder_depth * written * low, 3 * own.decoder_depth)
    # Nothing before the first look at the encoder depends on what is trained.
    back = 3 * own.decoder_depth - 2 + 1
    yield Traffic("decoder, back", "all_reduce", "tensor", back * written * low, back)
    yield Traffic("logits", "all_gather", "tensor", batch.rows * batch.output_length * math.ceil(words / tp) * low)
