"""Fit a language model on text alone: what the demo's reader learns before it is frozen.

B texts, L tokens, T output tokens.
"""

from __future__ import annotations

from paddle import Tensor, nn

from blip2x.losses.lm import lm_loss, shift_right, target_labels


class LanguageObjective(nn.Layer):
    """Next-token prediction; an encoder-decoder model reads a first part of the text and writes the rest."""

    def __init__(self, language: nn.Layer):
        super().__init__()
        self.language = language

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Texts padded on the right -> ``loss``.

        Decoder only: ``text_ids_BL``, ``text_mask_BL``; the first token is no target, as nothing comes before it.
        Encoder-decoder: ``input_ids_BL``, ``input_mask_BL`` and ``output_ids_BT``, ``output_mask_BT``, all of them targets.
        """
        if self.language.is_encoder_decoder:
            embeds_BLD = self.language.embed(batch["input_ids_BL"])
            return {"loss": output_loss(self.language, embeds_BLD, batch["input_mask_BL"], batch)}
        ids_BL, mask_BL = batch["text_ids_BL"], batch["text_mask_BL"]
        logits_BLV = self.language(self.language.embed(ids_BL), mask_BL)
        return {"loss": lm_loss(logits_BLV[:, :-1], target_labels(ids_BL, mask_BL)[:, 1:])}


def output_loss(language: nn.Layer, embeds_BSD: Tensor, mask_BS: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Loss of ``output_ids_BT`` written by an encoder-decoder model whose encoder reads `embeds_BSD` (S positions)."""
    ids_BT, mask_BT = batch["output_ids_BT"], batch["output_mask_BT"]
    logits_BTV = language(embeds_BSD, mask_BS, *shift_right(ids_BT, mask_BT, language.start_id))
    return lm_loss(logits_BTV, target_labels(ids_BT, mask_BT))
