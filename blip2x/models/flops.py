"""How many operations a batch takes, from the config alone: no model, no weights, no paddle.

Counted are matrix products, a multiplication and an addition as 2: linear layers, scores and mixtures of attention, the
convolution that makes patches, and heads. Norms, activations and the optimizer have no products and do not count. Masked scores
count like others, since the kernels compute them. Nothing counts that a program could leave out: what is computed again in the
backward pass, a frozen encoder's gradients, logits and a last layer's outputs that no loss and no decoding step reads, and keys
and values of patches that are there already.

B rows, T positions that ask, S positions that answer, Q queries, L text tokens, P patches with the class token, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blip2x.config.model import LanguageConfig, ModelConfig, OptConfig, QFormerConfig, T5Config, VisionConfig
from blip2x.errors import UserError

STAGE1_KINDS = ("pretrain_stage1", "retrieval")
KINDS = ("pretrain_vision", "pretrain_language", *STAGE1_KINDS, "pretrain_stage2", "caption", "vqa_finetune")


@dataclass(frozen=True)
class Work:
    """What is done to one batch.

    Attributes:
        images: images that go through the image encoder.
        texts: rows of text: captions, questions; in stage 1 pairs.
        text_tokens: tokens of a text; with generation, of the prompt behind the queries.
        output_tokens: tokens that an encoder-decoder is trained to write.
        new_tokens: written per text.
        beams: per text.
    """

    images: int
    texts: int
    text_tokens: int
    output_tokens: int = 0
    new_tokens: int = 0
    beams: int = 1


class Count(NamedTuple):
    """Operations of products with a weight, and of products of activations: scores and mixtures of attention."""

    weights: float = 0
    activations: float = 0

    def __add__(self, other: Count) -> Count:  # type: ignore[override]  # numbers, no joined tuple
        return Count(self.weights + other.weights, self.activations + other.activations)

    def __mul__(self, times: float) -> Count:  # type: ignore[override]
        return Count(times * self.weights, times * self.activations)

    @property
    def forward(self) -> float:
        """All of them."""
        return self.weights + self.activations

    def backward(self, *, trained: bool) -> float:
        """Of their gradients: a product of activations has two, one with a weight two as well, or one if that is frozen."""
        return (2 if trained else 1) * self.weights + 2 * self.activations


def training_flops(
    cfg: ModelConfig,
    kind: str,
    work: Work,
    *,
    data_ranks: int = 1,
    question_tokens: int | None = None,
    vocab_sizes: Mapping[str, int] | None = None,
    classes: Sequence[int] = (),
) -> dict[str, float]:
    """Operations of forward and backward of one rank's batch: "vision", "qformer", "language" forward, and "backward" of all.

    Every text has an image that the Q-Former looks at; `work.images` counts for the image encoder only, and is 0 where its
    features are there already. Heads count with the part that feeds them.

    Args:
        cfg: the model; of a part that the task fits alone, `frozen` does not count.
        kind: a task that trains.
        work: the batch of one rank.
        data_ranks: ranks whose pairs are contrasted with each other (stage 1).
        question_tokens: that the Q-Former reads (vqa_finetune); None: as many as `work.text_tokens`.
        vocab_sizes: "qformer" and "language" -> words, where the config leaves them to the tokenizer.
        classes: of each kind of label that an image encoder is fitted on (pretrain_vision).

    Raises:
        UserError: an unknown task, or a number of words that neither the config nor `vocab_sizes` says.
    """
    counts = training_counts(
        cfg, kind, work, data_ranks=data_ranks, question_tokens=question_tokens, vocab_sizes=vocab_sizes, classes=classes
    )
    trained = trained_parts(cfg, kind)
    backward = sum(backward_flops(part, count, trained) for part, count in counts.items())
    return {**{part: count.forward for part, count in counts.items()}, "backward": backward}


def training_counts(
    cfg: ModelConfig,
    kind: str,
    work: Work,
    *,
    data_ranks: int = 1,
    question_tokens: int | None = None,
    vocab_sizes: Mapping[str, int] | None = None,
    classes: Sequence[int] = (),
) -> dict[str, Count]:
    """Of the forward pass by part, "vision", "qformer" and "language"; arguments and errors as of `training_flops`."""
    words = _Words(cfg, vocab_sizes or {})
    vision, qformer, language = vision_count(cfg.vision) * work.images, Count(), Count()
    if kind == "pretrain_vision":
        vision += _linear(work.images * (patches(cfg.vision) - 1), cfg.vision.width, sum(classes))
    elif kind == "pretrain_language":
        vision, language = Count(), _read_and_write(cfg.language, words, work, queries=0)
    elif kind in STAGE1_KINDS:
        qformer = _stage1(cfg, words, work, data_ranks)
    elif kind in KINDS:
        asked = 0
        if kind == "vqa_finetune":
            asked = work.text_tokens if question_tokens is None else question_tokens
        qformer = _soft_prompt(cfg, work.texts, work.texts, asked, reaches_all=True)
        language = _read_and_write(cfg.language, words, work, queries=cfg.qformer.num_queries)
    else:
        raise UserError(f"task {kind!r} trains nothing whose operations are known; choose one of {', '.join(KINDS)}")
    return {"vision": vision, "qformer": qformer, "language": language}


def trained_parts(cfg: ModelConfig, kind: str) -> set[str]:
    """Of "vision", "qformer" and "language", those that the task changes; the Q-Former with its norm and its heads."""
    if kind in ("pretrain_vision", "pretrain_language"):
        return {kind.removeprefix("pretrain_")}
    parts = ("vision",) if kind in STAGE1_KINDS else ("vision", "language")
    return {"qformer", *(part for part in parts if not getattr(cfg, part).frozen)}


def backward_flops(part: str, count: Count, trained: Collection[str]) -> float:
    """Operations of going back through `part`; nothing goes back through a frozen image encoder."""
    if part == "vision" and part not in trained:
        return 0.0
    return count.backward(trained=part in trained)


def generation_flops(
    cfg: ModelConfig, work: Work, *, question_tokens: int = 0, vocab_sizes: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Operations of writing `work.new_tokens` behind each text: "vision", "qformer" and "language".

    An image and its queries go through each model once, however many texts are about it; a prompt once for all its beams.
    An encoder reads queries and prompt together, so once for each text.

    Args:
        cfg: the model.
        work: the batch.
        question_tokens: that the Q-Former reads (a model of vqa_finetune), so that it looks once for each text; 0: it does not.
        vocab_sizes: as of `training_flops`.
    """
    words = _Words(cfg, vocab_sizes or {})
    passes = work.texts if question_tokens else work.images
    qformer = _soft_prompt(cfg, passes, work.images, question_tokens)
    write = _opt_writes if cfg.language.kind == "opt" else _t5_writes
    language = write(cfg.language, words("language"), work, passes, cfg.qformer.num_queries)
    return {
        "vision": vision_count(cfg.vision).forward * work.images,
        "qformer": qformer.forward,
        "language": language.forward,
    }


def patches(cfg: VisionConfig) -> int:
    """Of an image, with the class token."""
    return 1 + (cfg.image_size // cfg.patch_size) ** 2


def vision_count(cfg: VisionConfig) -> Count:
    """Of one image; both encoders have the same products."""
    length = patches(cfg)
    block = _linear(length, cfg.width, 4 * cfg.width + 2 * cfg.mlp_width) + _attend(length, length, cfg.width)
    return _linear(length - 1, 3 * cfg.patch_size**2, cfg.width) + block * cfg.depth


def opt_count(cfg: OptConfig, length: int, past: int = 0) -> Count:
    """Of the layers, for `length` tokens of a text behind `past` ones; without the head."""
    layer = _linear(length, cfg.width, 4 * cfg.width + 2 * cfg.mlp_width) + _attend(length, past + length, cfg.width)
    return layer * cfg.depth


class _Words:
    """Vocabulary sizes by part."""

    def __init__(self, cfg: ModelConfig, others: Mapping[str, int]):
        self.sizes = {
            part: getattr(cfg, part).vocab_size or others.get(part)
            for part in ("qformer", "language")
            if hasattr(getattr(cfg, part), "vocab_size")
        }

    def __call__(self, part: str) -> int:
        size = self.sizes.get(part)
        if size is None:
            raise UserError(f"model.{part}.vocab_size=null leaves it to the tokenizer; set the number of words to count with")
        return size


def _linear(positions: float, inputs: int, outputs: int) -> Count:
    return Count(weights=2 * positions * inputs * outputs)


def _attend(asking: float, answering: float, width: int) -> Count:
    """Scores, and the mixture of values."""
    return Count(activations=2 * 2 * asking * answering * width)


def _looking_layers(cfg: QFormerConfig) -> int:
    return -(-cfg.depth // cfg.cross_attention_every)


def _patch_keys(cfg: ModelConfig) -> Count:
    """Keys and values of one image's patches, in all layers that look at it."""
    return _linear(patches(cfg.vision), cfg.vision.width, 2 * cfg.qformer.width) * _looking_layers(cfg.qformer)


def _qformer_pass(cfg: ModelConfig, *, queries: int, tokens: int, past: int = 0, wanted: int | None = None) -> Count:
    """Of one row, the keys and values of its patches left out.

    With `wanted`, only the first so many positions go on in the last layer, where the others answer and no more.
    """
    own, length = cfg.qformer, queries + tokens
    layer = _linear(length, own.width, 4 * own.width + 2 * own.mlp_width) + _attend(length, past + length, own.width)
    look = _linear(queries, own.width, 2 * own.width) + _attend(queries, patches(cfg.vision), own.width)
    unread = 0 if wanted is None else length - wanted
    return layer * own.depth + look * _looking_layers(own) + _answering_only(own, unread, past + length) * -1


def _answering_only(cfg: QFormerConfig | OptConfig, positions: float, answering: float) -> Count:
    """What a layer need not do for positions that only give keys and values."""
    return _linear(positions, cfg.width, 2 * cfg.width + 2 * cfg.mlp_width) + _attend(positions, answering, cfg.width)


def contrast_count(cfg: ModelConfig, pairs: int, length: int) -> Count:
    """Of the features that are contrasted, which cached contrast computes once more (blip2x/objectives/cached.py)."""
    own, queries = cfg.qformer, cfg.qformer.num_queries
    look = _qformer_pass(cfg, queries=queries, tokens=0) + _patch_keys(cfg)
    read = _qformer_pass(cfg, queries=0, tokens=length, wanted=1)
    return (look + read + _linear(queries + 1, own.width, own.embed_dim)) * pairs


def _stage1(cfg: ModelConfig, words: _Words, work: Work, data_ranks: int) -> Count:
    """Of contrast, matching and captions; images of other ranks have their patches' keys made once more, as negatives."""
    own, pairs, length, queries = cfg.qformer, work.texts, work.text_tokens, cfg.qformer.num_queries
    others = _patch_keys(cfg) * (0 if data_ranks == 1 else 1)
    match = _match(cfg, length) * 3
    # Nothing follows the last token, so it is not read.
    write = _qformer_pass(cfg, queries=0, tokens=length - 1, past=queries)
    write += _linear(length - 1, own.width, own.width + words("qformer"))
    contrast = Count(activations=2 * 2 * pairs * (data_ranks * pairs) * queries * own.embed_dim)  # both directions
    return contrast_count(cfg, pairs, length) + (others + match + write) * pairs + contrast


def _match(cfg: ModelConfig, length: int) -> Count:
    """Of one pair, the keys and values of its patches left out."""
    queries = cfg.qformer.num_queries
    return _qformer_pass(cfg, queries=queries, tokens=length, wanted=queries) + _linear(queries, cfg.qformer.width, 2)


def _soft_prompt(cfg: ModelConfig, passes: int, images: int, question_tokens: int, *, reaches_all: bool = False) -> Count:
    """`reaches_all` as of `QFormer.encode_pair`."""
    own = cfg.qformer
    wanted = None if reaches_all else own.num_queries
    count = _qformer_pass(cfg, queries=own.num_queries, tokens=question_tokens, wanted=wanted)
    return (count + _linear(own.num_queries, own.width, cfg.language.width)) * passes + _patch_keys(cfg) * images


def _read_and_write(cfg: LanguageConfig, words: _Words, work: Work, *, queries: int) -> Count:
    """Of training; of a decoder's text every token is predicted but the first: bos, or what nothing comes before."""
    if cfg.kind == "opt":
        length = work.text_tokens
        return (opt_count(cfg, queries + length) + _linear(length - 1, cfg.width, words("language"))) * work.texts
    length, output = queries + work.text_tokens, work.output_tokens
    head = _linear(output, cfg.width, words("language"))
    return (_t5_reads(cfg, length) + _t5_memory(cfg, length) + _t5_decodes(cfg, output, output, length) + head) * work.texts


def _opt_writes(cfg: OptConfig, vocab_size: int, work: Work, passes: int, queries: int) -> Count:
    """Of queries and prompt only the last token goes on in the last layer."""
    length = work.text_tokens
    share = opt_count(cfg, queries) + _answering_only(cfg, queries, queries) * -1
    prefill = opt_count(cfg, length, queries) + _answering_only(cfg, length - 1, queries + length) * -1
    return (
        share * passes
        + prefill * work.texts
        + _steps(work, lambda done: opt_count(cfg, 1, queries + length + done - 1), cfg.width, vocab_size)
    )


def _t5_writes(cfg: T5Config, vocab_size: int, work: Work, passes: int, queries: int) -> Count:
    length = queries + work.text_tokens
    start = _t5_decodes(cfg, 1, 1, length)
    read = (_t5_reads(cfg, length) + _t5_memory(cfg, length) + start) * work.texts
    return read + _steps(work, lambda done: _t5_decodes(cfg, 1, 1 + done, length), cfg.width, vocab_size)


def _steps(work: Work, step: Callable[[int], Count], width: int, vocab_size: int) -> Count:
    """The first token comes from what was read, once for all beams; the last one that is written is not read again."""
    head = _linear(1, width, vocab_size)
    count = head * work.texts if work.new_tokens else Count()
    for done in range(1, work.new_tokens):
        count += (step(done) + head) * (work.texts * work.beams)
    return count


def _t5_reads(cfg: T5Config, length: int) -> Count:
    inner = cfg.num_heads * cfg.head_width
    layer = _linear(length, cfg.width, 4 * inner + 3 * cfg.mlp_width) + _attend(length, length, inner)
    return layer * cfg.encoder_depth


def _t5_memory(cfg: T5Config, length: int) -> Count:
    """Keys and values of what the encoder gives, in all of the decoder's layers."""
    return _linear(length, cfg.width, 2 * cfg.num_heads * cfg.head_width) * cfg.decoder_depth


def _t5_decodes(cfg: T5Config, asking: int, answering: int, read: int) -> Count:
    """`asking` tokens in the decoder's layers, which see `answering` tokens and `read` positions of the encoder."""
    inner = cfg.num_heads * cfg.head_width
    layer = _linear(asking, cfg.width, 6 * inner + 3 * cfg.mlp_width) + _attend(asking, answering + read, inner)
    return layer * cfg.decoder_depth


def retrieval_flops(cfg: ModelConfig, work: Work, *, pairs: int) -> dict[str, float]:
    """Operations of a search among `work.images` images and `work.texts` texts, of which `pairs` are matched.

    Each image has its patches' keys made once to be contrasted and once for all that it is matched with.
    """
    own, queries, length = cfg.qformer, cfg.qformer.num_queries, work.text_tokens
    look = _qformer_pass(cfg, queries=queries, tokens=0) + _patch_keys(cfg) * 2 + _linear(queries, own.width, own.embed_dim)
    read = _qformer_pass(cfg, queries=0, tokens=length, wanted=1) + _linear(1, own.width, own.embed_dim)
    contrast = Count(activations=2 * work.images * work.texts * queries * own.embed_dim)
    qformer = look * work.images + read * work.texts + _match(cfg, length) * pairs + contrast
    return {"vision": vision_count(cfg.vision).forward * work.images, "qformer": qformer.forward}
