"""Fit a language model on text alone: what the demo's reader learns before it is frozen.

B texts, Q queries, L tokens, S = Q + L, T output tokens, N targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import Tensor, nn

from blip2x.losses.lm import IGNORED, lm_loss, shift_right, target_labels
from blip2x.models.places import at_places
from blip2x.objectives.tokens import weighed, with_token_shares
from blip2x.parallel.context import Context


class LanguageObjective(nn.Layer):
    """Next-token prediction; an encoder-decoder model reads a first part of the text and writes the rest.

    Args:
        language: a language model of blip2x.models.language.
        context: the ranks over whose tokens the mean is taken.
    """

    def __init__(self, language: nn.Layer, context: Context = Context()):  # noqa: B008  # it is frozen
        super().__init__()
        self.language = language
        self._context = context

    def prepare(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A step's micro-batches with what makes their mean the one per token of all; see `with_token_shares`."""
        if self.language.is_encoder_decoder:
            counts = [batch["output_mask_BT"].sum() for batch in batches]
        else:
            counts = [batch["text_mask_BL"][:, 1:].sum() for batch in batches]
        return with_token_shares(batches, counts, self._context)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Texts padded on the right -> ``loss``.

        Decoder only: ``text_ids_BL``, ``text_mask_BL``; the first token is no target, as nothing comes before it.
        Encoder-decoder: ``input_ids_BL``, ``input_mask_BL`` and ``output_ids_BT``, ``output_mask_BT``, all of them targets.

        With ``target_place_N``, the targets' places in B * L, or in B * T, the head looks for these alone.
        """
        if self.language.is_encoder_decoder:
            embeds_BLD = self.language.embed(batch["input_ids_BL"])
            return {"loss": weighed(output_loss(self.language, embeds_BLD, batch["input_mask_BL"], batch), batch)}
        mask_BL = batch["text_mask_BL"]
        embeds_BLD = self.language.embed(batch["text_ids_BL"])
        return {"loss": weighed(text_loss(self.language, embeds_BLD, mask_BL, batch, mask_BL), batch)}


def text_loss(language: nn.Layer, embeds_BSD: Tensor, mask_BS: Tensor, batch: dict[str, Any], is_target_BL: Tensor) -> Tensor:
    """Loss of ``text_ids_BL`` where `is_target_BL`, read by a decoder-only model as the last L of S positions.

    A token is predicted one position earlier, the first one by the last query; without queries (S = L) it is no target.
    """
    ids_BL, place_N = batch["text_ids_BL"], batch.get("target_place_N")
    rows, length = ids_BL.shape
    queries = embeds_BSD.shape[1] - length
    label_BL = target_labels(ids_BL, is_target_BL)
    if not queries:
        label_BL[:, 0] = IGNORED
    if place_N is None:
        place_N = paddle.arange(rows * length)
    before_N = place_N + (place_N // length + 1) * queries - 1  # in B * S
    logits_NV = language(embeds_BSD, mask_BS, before_N.clip(min=0))
    return lm_loss(logits_NV, at_places(label_BL, place_N))


def output_loss(language: nn.Layer, embeds_BSD: Tensor, mask_BS: Tensor, batch: dict[str, Any]) -> Tensor:
    """Loss of ``output_ids_BT`` written by an encoder-decoder model whose encoder reads `embeds_BSD` (S positions)."""
    ids_BT, mask_BT, place_N = batch["output_ids_BT"], batch["output_mask_BT"], batch.get("target_place_N")
    logits = language(embeds_BSD, mask_BS, *shift_right(ids_BT, mask_BT, language.start_id), place_N)
    return lm_loss(logits, at_places(target_labels(ids_BT, mask_BT), place_N))
