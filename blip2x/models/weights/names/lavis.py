"""LAVIS's names, in files of whole models and of image encoders alone."""

from __future__ import annotations

from blip2x.models.weights.names.language import HEAD_ROWS, TEXT_ROWS, bert_layer, feed_forward, head_tied
from blip2x.models.weights.names.table import EMBEDDING, LEADING, LINEAR, PLAIN, SCALAR, TENSOR, Change, Row, Table, prefixed

_BLOCK, _OURS = "blocks.{i}", "vision.blocks.{i}"
EVA_ROWS = (
    Row("cls_token", "vision.embeddings.class_token", TENSOR),
    Row("pos_embed", "vision.embeddings.positions", TENSOR),
    Row("patch_embed.proj", "vision.embeddings.projection", PLAIN),
    Row(f"{_BLOCK}.norm1", f"{_OURS}.norm1", PLAIN),
    Row(f"{_BLOCK}.attn.qkv", f"{_OURS}.attention.qkv", LINEAR),
    Row(f"{_BLOCK}.attn.q_bias", f"{_OURS}.attention.query_bias", TENSOR),
    Row(f"{_BLOCK}.attn.v_bias", f"{_OURS}.attention.value_bias", TENSOR),
    Row(f"{_BLOCK}.attn.proj", f"{_OURS}.attention.out", LINEAR),
    Row(f"{_BLOCK}.norm2", f"{_OURS}.norm2", PLAIN),
    Row(f"{_BLOCK}.mlp.fc1", f"{_OURS}.fc1", LINEAR),
    Row(f"{_BLOCK}.mlp.fc2", f"{_OURS}.fc2", LINEAR),
)
EVA_DROPPED = (
    (r"(fc_norm|norm|head)\..*", "BLIP-2 reads the last block's output"),
    (r"(blocks\.\d+\.attn\.)?(relative_position_index|k_bias)", "counted, not learned"),
)
_CLIP_BLOCK = "transformer.resblocks.{i}"
CLIP_ROWS = (
    Row("class_embedding", "vision.embeddings.class_token", LEADING),
    Row("positional_embedding", "vision.embeddings.positions", LEADING),
    Row("conv1", "vision.embeddings.projection", EMBEDDING),
    Row("ln_pre", "vision.norm", PLAIN),
    Row(f"{_CLIP_BLOCK}.ln_1", f"{_OURS}.norm1", PLAIN),
    Row(f"{_CLIP_BLOCK}.attn.in_proj_weight", f"{_OURS}.attention.qkv.weight", (("", Change.transpose),)),
    Row(f"{_CLIP_BLOCK}.attn.in_proj_bias", f"{_OURS}.attention.qkv.bias", TENSOR),
    Row(f"{_CLIP_BLOCK}.attn.out_proj", f"{_OURS}.attention.out", LINEAR),
    Row(f"{_CLIP_BLOCK}.ln_2", f"{_OURS}.norm2", PLAIN),
    Row(f"{_CLIP_BLOCK}.mlp.c_fc", f"{_OURS}.fc1", LINEAR),
    Row(f"{_CLIP_BLOCK}.mlp.c_proj", f"{_OURS}.fc2", LINEAR),
)
CLIP_DROPPED = ((r"(ln_post\..*|proj)", "BLIP-2 reads a block's output"),)

_BERT, _LAYER, _QFORMER = "Qformer.bert.", "Qformer.bert.encoder.layer.{i}", "qformer.layers.{i}"
QFORMER_ROWS = (
    *prefixed(TEXT_ROWS, theirs=_BERT),
    *prefixed(HEAD_ROWS, theirs="Qformer.cls."),
    Row(f"{_BERT}embeddings.LayerNorm", "qformer.embeddings_norm", PLAIN),
    *bert_layer(f"{_LAYER}.attention", f"{_QFORMER}.attention"),
    *bert_layer(f"{_LAYER}.crossattention", f"{_QFORMER}.cross_attention"),
    *feed_forward(_LAYER, f"{_QFORMER}.text_ffn"),
    *feed_forward(_LAYER, f"{_QFORMER}.query_ffn", "_query"),
)
QFORMER_DROPPED = (
    (r"Qformer\.bert\.embeddings\.position_ids", "counted, not learned"),
    (r"Qformer\.bert\.embeddings\.token_type_embeddings\.weight", "a caption is one segment"),
    (r"Qformer\.bert\.pooler\..*", "BERT's sentence classifier"),
)
HEADS = {"vision_proj": "vision_proj", "text_proj": "text_proj", "itm_head": "itm_head"}
LAVIS = Table(
    (
        *prefixed(EVA_ROWS, theirs="visual_encoder."),
        *prefixed(CLIP_ROWS, theirs="visual_encoder."),
        Row("ln_vision", "ln_vision", PLAIN),
        Row("query_tokens", "qformer.query_tokens", TENSOR),
        *QFORMER_ROWS,
        *(Row(theirs, ours, LINEAR) for theirs, ours in HEADS.items()),
        Row("temp", "temp", SCALAR),
        Row("opt_proj", "language_proj", LINEAR),
        Row("t5_proj", "language_proj", LINEAR),
    ),
    (
        *((rf"visual_encoder\.{pattern}", why) for pattern, why in (*EVA_DROPPED, *CLIP_DROPPED)),
        *QFORMER_DROPPED,
        (r"(opt_model|t5_model)\..*", "the language model comes from model.language.weights"),
    ),
    head_tied("Qformer.cls.", Change.none, must_equal=True),
)
EVA = Table(EVA_ROWS, EVA_DROPPED)
CLIP = Table(CLIP_ROWS, CLIP_DROPPED)
