"""The parameters of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blip2x.config.model import ModelConfig, OptConfig, T5Config, VisionConfig
from blip2x.models.flops import STAGE1_KINDS, patches, trained_parts

OPT_POSITIONS_AHEAD = 2  # rows of OPT's position embedding that no token has


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model.

    Attributes:
        part: "vision", "qformer" (its norm before it and its heads, too) or "language".
        numbers: in it.
        linear: it is the matrix of a linear layer, which sharding of stage 3 can cut.
    """

    part: str
    numbers: int
    linear: bool = False


def parameters(
    cfg: ModelConfig, kind: str, vocab_sizes: Mapping[str, int] | None = None, classes: Sequence[int] = ()
) -> list[Parameter]:
    """Of the model that the training `kind` has; `vocab_sizes` and `classes` as of `flops.training_flops`."""
    words = {part: getattr(cfg, part).vocab_size or (vocab_sizes or {}).get(part, 0) for part in ("qformer", "language")}
    if kind == "pretrain_vision":
        return [*_vision(cfg.vision), *_norm("vision", cfg.vision.width), *_heads(cfg.vision.width, classes)]
    if kind == "pretrain_language":
        return list(_language(cfg, words["language"]))
    found = [*_vision(cfg.vision), *_norm("qformer", cfg.vision.width)]
    own = cfg.qformer
    if kind in STAGE1_KINDS:
        found += _qformer(cfg, words["qformer"], writes=True)
        for outputs in (own.embed_dim, own.embed_dim, 2):
            found += _linear("qformer", own.width, outputs)
        return [*found, Parameter("qformer", 1)]
    found += _qformer(cfg, words["qformer"] if kind == "vqa_finetune" else 0, writes=False)
    found += _linear("qformer", own.width, cfg.language.width)
    return [*found, *_language(cfg, words["language"])]


def trained(cfg: ModelConfig, kind: str, found: Sequence[Parameter]) -> list[Parameter]:
    """Those of `found` that the training changes."""
    parts = trained_parts(cfg, kind)
    return [parameter for parameter in found if parameter.part in parts]


def _linear(part: str, inputs: int, outputs: int, *, bias: bool = True, cut: bool = True) -> Iterator[Parameter]:
    yield Parameter(part, inputs * outputs, cut)
    if bias:
        yield Parameter(part, outputs)


def _norm(part: str, width: int) -> Iterator[Parameter]:
    yield from (Parameter(part, width), Parameter(part, width))


def _heads(width: int, classes: Sequence[int]) -> Iterator[Parameter]:
    for count in classes:
        yield from _linear("vision", width, count)


def _vision(cfg: VisionConfig) -> Iterator[Parameter]:
    part, width, is_clip = "vision", cfg.width, cfg.kind == "clip_vit"
    yield Parameter(part, 3 * cfg.patch_size**2 * width)  # a convolution
    yield from (Parameter(part, width), Parameter(part, patches(cfg) * width))  # class token and positions
    if not is_clip:
        yield Parameter(part, width)  # the convolution's bias
    else:
        yield from _norm(part, width)
    for _ in range(cfg.depth):
        yield from _norm(part, width)
        has_bias = is_clip or cfg.key_bias
        yield from _linear(part, width, 3 * width, bias=has_bias, cut=False)  # which the layer above it reads
        if not has_bias:
            yield from (Parameter(part, width), Parameter(part, width))  # of queries and values
        yield from _linear(part, width, width)
        yield from _norm(part, width)
        yield from _linear(part, width, cfg.mlp_width)
        yield from _linear(part, cfg.mlp_width, width)


def _qformer(cfg: ModelConfig, words: int, *, writes: bool) -> Iterator[Parameter]:
    part, own, width = "qformer", cfg.qformer, cfg.qformer.width
    yield Parameter(part, own.num_queries * width)
    yield from _norm(part, width)
    if words:
        yield from (Parameter(part, words * width), Parameter(part, own.max_positions * width))
        if writes:
            yield from _linear(part, width, width)
            yield from _norm(part, width)
            yield Parameter(part, words)
    for index in range(own.depth):
        yield from _attention(width, width)
        if index % own.cross_attention_every == 0:
            yield from _attention(width, cfg.vision.width)
        for _ in range(2 if words else 1):  # of queries, and of texts
            yield from _linear(part, width, own.mlp_width)
            yield from _linear(part, own.mlp_width, width)
            yield from _norm(part, width)


def _attention(width: int, source: int) -> Iterator[Parameter]:
    for inputs in (width, source, source, width):
        yield from _linear("qformer", inputs, width)
    yield from _norm("qformer", width)


def _language(cfg: ModelConfig, words: int) -> Iterator[Parameter]:
    return _opt(cfg.language, words) if cfg.language.kind == "opt" else _t5(cfg.language, words)


def _opt(cfg: OptConfig, words: int) -> Iterator[Parameter]:
    part, width = "language", cfg.width
    yield from (Parameter(part, words * width), Parameter(part, (cfg.max_positions + OPT_POSITIONS_AHEAD) * width))
    for _ in range(cfg.depth):
        for _ in range(4):
            yield from _linear(part, width, width)
        yield from _linear(part, width, cfg.mlp_width)
        yield from _linear(part, cfg.mlp_width, width)
        yield from (*_norm(part, width), *_norm(part, width))
    yield from _norm(part, width)


def _t5(cfg: T5Config, words: int) -> Iterator[Parameter]:
    part, width, inner = "language", cfg.width, cfg.num_heads * cfg.head_width
    yield Parameter(part, words * width)
    yield from _linear(part, width, words, bias=False)
    for depth, attentions in ((cfg.encoder_depth, 1), (cfg.decoder_depth, 2)):
        yield Parameter(part, cfg.relative_buckets * cfg.num_heads)
        for _ in range(depth):
            for _ in range(attentions):
                for _ in range(3):
                    yield from _linear(part, width, inner, bias=False)
                yield from _linear(part, inner, width, bias=False)
                yield Parameter(part, width)  # the norm's
            for inputs, outputs in ((width, cfg.mlp_width), (width, cfg.mlp_width), (cfg.mlp_width, width)):
                yield from _linear(part, inputs, outputs, bias=False)
            yield Parameter(part, width)
        yield Parameter(part, width)
