"""Hugging Face's names in BLIP-2 repositories: Blip2ForConditionalGeneration and Blip2ForImageTextRetrieval."""

from __future__ import annotations

from blip2x.models.weights.names.language import OPT_ROWS, OPT_TIED, T5_DROPPED, T5_ROWS, TEXT_ROWS, feed_forward
from blip2x.models.weights.names.table import LINEAR, PLAIN, TENSOR, Row, Table, prefixed

_VISION, _BLOCK = "vision_model.encoder.layers.{i}", "vision.blocks.{i}"
_LAYER, _QFORMER = "qformer.encoder.layer.{i}", "qformer.layers.{i}"


def _attention(theirs: str, ours: str) -> list[Row]:
    return [
        *(Row(f"{theirs}.attention.{name}", f"{ours}.{name}", LINEAR) for name in ("query", "key", "value")),
        Row(f"{theirs}.output.dense", f"{ours}.out", LINEAR),
        Row(f"{theirs}.output.LayerNorm", f"{ours}.norm", PLAIN),
    ]


HUGGINGFACE = Table(
    (
        Row("vision_model.embeddings.class_embedding", "vision.embeddings.class_token", TENSOR),
        Row("vision_model.embeddings.position_embedding", "vision.embeddings.positions", TENSOR),
        Row("vision_model.embeddings.patch_embedding", "vision.embeddings.projection", PLAIN),
        Row(f"{_VISION}.layer_norm1", f"{_BLOCK}.norm1", PLAIN),
        Row(f"{_VISION}.self_attn.qkv", f"{_BLOCK}.attention.qkv", LINEAR),
        Row(f"{_VISION}.self_attn.projection", f"{_BLOCK}.attention.out", LINEAR),
        Row(f"{_VISION}.layer_norm2", f"{_BLOCK}.norm2", PLAIN),
        Row(f"{_VISION}.mlp.fc1", f"{_BLOCK}.fc1", LINEAR),
        Row(f"{_VISION}.mlp.fc2", f"{_BLOCK}.fc2", LINEAR),
        Row("vision_model.post_layernorm", "ln_vision", PLAIN),
        Row("query_tokens", "qformer.query_tokens", TENSOR),
        *TEXT_ROWS,
        Row("qformer.layernorm", "qformer.embeddings_norm", PLAIN),
        *_attention(f"{_LAYER}.attention", f"{_QFORMER}.attention"),
        *_attention(f"{_LAYER}.crossattention", f"{_QFORMER}.cross_attention"),
        *feed_forward(_LAYER, f"{_QFORMER}.text_ffn"),
        *feed_forward(_LAYER, f"{_QFORMER}.query_ffn", "_query"),
        Row("vision_projection", "vision_proj", LINEAR),
        Row("text_projection", "text_proj", LINEAR),
        Row("itm_head", "itm_head", LINEAR),
        Row("language_projection", "language_proj", LINEAR),
        *prefixed(OPT_ROWS, theirs="language_model.model.decoder."),
        *prefixed(T5_ROWS, theirs="language_model."),
    ),
    (
        *((rf"language_model\.{pattern}", why) for pattern, why in T5_DROPPED),
        (r"(vision_model\.)?embeddings\.position_ids", "counted, not learned"),
    ),
    tuple(tied._replace(theirs=f"language_model.{tied.theirs}") for tied in OPT_TIED),
)
