"""Fit a language model on text alone: what the demo's reader learns before it is frozen.

B texts, L tokens, T output tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddle import Tensor, nn

from blip2x.losses.lm import lm_loss, shift_right, target_labels
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
        """
        if self.language.is_encoder_decoder:
            embeds_BLD = self.language.embed(batch["input_ids_BL"])
            return {"loss": weighed(output_loss(self.language, embeds_BLD, batch["input_mask_BL"], batch), batch)}
        ids_BL, mask_BL = batch["text_ids_BL"], batch["text_mask_BL"]
        logits_BLV = self.language(self.language.embed(ids_BL), mask_BL)
        return {"loss": weighed(lm_loss(logits_BLV[:, :-1], target_labels(ids_BL, mask_BL)[:, 1:]), batch)}


def output_loss(language: nn.Layer, embeds_BSD: Tensor, mask_BS: Tensor, batch: dict[str, Any]) -> Tensor:
    """Loss of ``output_ids_BT`` written by an encoder-decoder model whose encoder reads `embeds_BSD` (S positions)."""
    ids_BT, mask_BT = batch["output_ids_BT"], batch["output_mask_BT"]
    logits_BTV = language(embeds_BSD, mask_BS, *shift_right(ids_BT, mask_BT, language.start_id))
    return lm_loss(logits_BTV, target_labels(ids_BT, mask_BT))
