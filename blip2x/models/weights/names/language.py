"""OPT, T5 and BERT as Hugging Face's repositories of their own name them; BLIP-2's put a prefix before."""

from __future__ import annotations

from blip2x.models.weights.names.table import (
    EMBEDDING,
    LINEAR,
    MATRIX,
    PLAIN,
    TENSOR,
    Change,
    Row,
    Table,
    Tied,
    in_out,
    prefixed,
)

OPT_ROWS = prefixed(
    (
        Row("embed_tokens", "embeddings.word_embeddings", EMBEDDING),
        Row("embed_positions", "embeddings.position_embeddings", EMBEDDING),
        *(Row(f"layers.{{i}}.self_attn.{x}_proj", f"decoder.layers.{{i}}.self_attn.{x}_proj", LINEAR) for x in ("q", "k", "v")),
        Row("layers.{i}.self_attn.out_proj", "decoder.layers.{i}.self_attn.out_proj", LINEAR),
        Row("layers.{i}.self_attn_layer_norm", "decoder.layers.{i}.norm1", PLAIN),
        Row("layers.{i}.fc1", "decoder.layers.{i}.linear1", LINEAR),
        Row("layers.{i}.fc2", "decoder.layers.{i}.linear2", LINEAR),
        Row("layers.{i}.final_layer_norm", "decoder.layers.{i}.norm2", PLAIN),
        Row("final_layer_norm", "decoder.final_layer_norm", PLAIN),
    ),
    ours="language.opt.",
)


def _t5_block(stack: str, feed_forward: int) -> list[str]:
    """Names of a block's matrices."""
    block = f"{stack}.block.{{i}}.layer."
    names = [f"{block}0.SelfAttention.{x}" for x in "qkvo"]
    if stack == "decoder":
        names += [f"{block}1.EncDecAttention.{x}" for x in "qkvo"]
    return names + [f"{block}{feed_forward}.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")]


def _t5_rows() -> list[Row]:
    rows = [Row("shared", "shared", EMBEDDING), Row("lm_head", "lm_head", MATRIX)]
    for stack, feed_forward in (("encoder", 1), ("decoder", 2)):
        rows += [Row(name, name, MATRIX) for name in _t5_block(stack, feed_forward)]
        norms = [f"{stack}.block.{{i}}.layer.{layer}.layer_norm" for layer in range(feed_forward + 1)]
        positions = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
        rows += [Row(name, name, EMBEDDING) for name in (*norms, f"{stack}.final_layer_norm", positions)]
    return rows


T5_ROWS = prefixed(_t5_rows(), ours="language.")
T5_DROPPED = (
    (r"(encoder|decoder)\.embed_tokens\.weight", "the same as shared.weight"),
    (
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        "attention to the encoder has no positions",
    ),
)

OPT_WORDS = "language.opt.embeddings.word_embeddings.weight"
OPT_TIED = (Tied("lm_head.weight", OPT_WORDS, Change.none, must_equal=True),)
OPT = {prefix: Table(prefixed(OPT_ROWS, theirs=prefix), tied=OPT_TIED) for prefix in ("model.decoder.", "decoder.")}
T5 = Table(T5_ROWS, T5_DROPPED)

# PaddleNLP's own layout of both is ours
PADDLE_OPT_ROWS = in_out(Row(row.ours, row.ours, row.parts) for row in OPT_ROWS)
PADDLE_T5_ROWS = tuple(Row("language.t5." + row.ours.removeprefix("language."), row.ours, row.parts) for row in in_out(T5_ROWS))

_ATTENTION = {"self.query": "query", "self.key": "key", "self.value": "value", "output.dense": "out"}


def bert_layer(theirs: str, ours: str) -> list[Row]:
    """One attention of BERT, its norm included; `theirs` ends where "self" begins."""
    return [
        *(Row(f"{theirs}.{name}", f"{ours}.{ours_name}", LINEAR) for name, ours_name in _ATTENTION.items()),
        Row(f"{theirs}.output.LayerNorm", f"{ours}.norm", PLAIN),
    ]


def feed_forward(theirs: str, ours: str, suffix: str = "") -> list[Row]:
    """A feed-forward of BERT, or, with a suffix, the queries'."""
    return [
        Row(f"{theirs}.intermediate{suffix}.dense", f"{ours}.fc1", LINEAR),
        Row(f"{theirs}.output{suffix}.dense", f"{ours}.fc2", LINEAR),
        Row(f"{theirs}.output{suffix}.LayerNorm", f"{ours}.norm", PLAIN),
    ]


_LAYER, _OURS = "encoder.layer.{i}", "qformer.layers.{i}"
HEAD_ROWS = (
    Row("predictions.transform.dense", "qformer.text.head_transform", LINEAR),
    Row("predictions.transform.LayerNorm", "qformer.text.head_norm", PLAIN),
    Row("predictions.bias", "qformer.text.head_bias", TENSOR),
)
TEXT_ROWS = (
    Row("embeddings.word_embeddings", "qformer.text.word_embeddings", EMBEDDING),
    Row("embeddings.position_embeddings", "qformer.text.position_embeddings", EMBEDDING),
)


def head_tied(prefix: str, change: Change, *, must_equal: bool) -> tuple[Tied, ...]:
    """The captioner's output matrix and its bias, which are the word embeddings and the head's bias."""
    return (
        Tied(f"{prefix}predictions.decoder.weight", "qformer.text.word_embeddings.weight", change, must_equal),
        Tied(f"{prefix}predictions.decoder.bias", "qformer.text.head_bias", Change.none, must_equal),
    )


# Section 3.1 of the paper: a Q-Former starts from BERT, its queries' feed-forward as a copy of the text's.
BERT = Table(
    (
        *TEXT_ROWS,
        *prefixed(HEAD_ROWS, theirs="cls."),
        Row("embeddings.LayerNorm", "qformer.embeddings_norm", PLAIN),
        *bert_layer(f"{_LAYER}.attention", f"{_OURS}.attention"),
        *feed_forward(_LAYER, f"{_OURS}.text_ffn"),
        *feed_forward(_LAYER, f"{_OURS}.query_ffn"),
    ),
    (
        (r"embeddings\.token_type_embeddings\.weight", "a caption is one segment"),
        (r"embeddings\.position_ids", "counted, not learned"),
        (r"pooler\..*", "BERT's sentence classifier"),
        (r"cls\.seq_relationship\..*", "BERT's next-sentence head"),
    ),
    head_tied("cls.", Change.none, must_equal=True),
)
