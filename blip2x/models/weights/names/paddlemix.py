"""PaddleMIX's names: LAVIS's, but for what its Q-Former holds besides, and laid out as Paddle does."""

from __future__ import annotations

from blip2x.models.weights.names.language import OPT_WORDS, PADDLE_OPT_ROWS, PADDLE_T5_ROWS, head_tied
from blip2x.models.weights.names.lavis import EVA_DROPPED, EVA_ROWS, HEADS, QFORMER_DROPPED, QFORMER_ROWS
from blip2x.models.weights.names.table import LINEAR, PLAIN, SCALAR, TENSOR, Change, Row, Table, Tied, in_out, prefixed

_LANGUAGE = "language_model."
PADDLEMIX = Table(
    in_out(
        (
            *prefixed(EVA_ROWS, theirs="visual_encoder."),
            Row("Qformer.ln_vision", "ln_vision", PLAIN),
            Row("Qformer.query_tokens", "qformer.query_tokens", TENSOR),
            *QFORMER_ROWS,
            *(Row(f"Qformer.{theirs}", ours, LINEAR) for theirs, ours in HEADS.items()),
            Row("temp", "temp", SCALAR),
            Row("Qformer.temp", "temp", SCALAR),
            Row("Qformer.language_projection", "language_proj", LINEAR),
            *(Row(_LANGUAGE + row.theirs.removeprefix("language."), row.ours, row.parts) for row in PADDLE_OPT_ROWS),
            *(Row(_LANGUAGE + row.theirs.removeprefix("language."), row.ours, row.parts) for row in PADDLE_T5_ROWS),
            Row(f"{_LANGUAGE}lm_head", "language.lm_head", LINEAR),
        )
    ),
    (
        *((rf"visual_encoder\.{pattern}", why) for pattern, why in EVA_DROPPED),
        *QFORMER_DROPPED,
        (r"language_model\.t5\.(encoder|decoder)\.embed_tokens\.weight", "the same as shared.weight"),
    ),
    (
        # trained apart from the embeddings there, and random in OPT's files that PaddleNLP converted
        *head_tied("Qformer.cls.", Change.transpose, must_equal=False),
        Tied(f"{_LANGUAGE}lm_head.decoder_weight", OPT_WORDS, Change.none, must_equal=False),
    ),
)
