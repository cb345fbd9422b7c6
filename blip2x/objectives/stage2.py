"""Stage 2, section 3.2 of the BLIP-2 paper: a frozen language model writes the caption, the queries learn to tell it what.

B images, Q queries, L text tokens, T output tokens, N targets, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paddle import Tensor, nn

from blip2x.models.assemblies.stage2 import join_prefix
from blip2x.objectives.language import output_loss, text_loss
from blip2x.objectives.tokens import weighed, with_token_shares
from blip2x.parallel.context import Context


class Stage2Objective(nn.Layer):
    """Cross-entropy of the caption given [queries][text before it]; used for captioning fine-tuning as well.

    Args:
        model: a `Stage2Model`.
        context: the ranks over whose tokens the mean is taken.
    """

    def __init__(self, model: nn.Layer, context: Context = Context()):  # noqa: B008  # it is frozen
        super().__init__()
        self.model = model
        self._context = context

    def prepare(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A step's micro-batches with what makes their mean the one per token of all; see `with_token_shares`."""
        mask = "output_mask_BT" if self.model.language.is_encoder_decoder else "label_mask_BL"
        return with_token_shares(batches, [batch[mask].sum() for batch in batches], self._context)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``image_BCHW`` and the language model's texts, padded on the right -> ``loss``.

        With ``encoded_BPD``, what a frozen image encoder gives, the images themselves are not needed.

        Decoder only: ``text_ids_BL``, ``text_mask_BL`` and ``label_mask_BL``, 1 where a token is to be predicted (not in the
        prompt). Encoder-decoder: ``input_ids_BL``, ``input_mask_BL`` and ``output_ids_BT``, ``output_mask_BT``, all of them
        to be predicted.

        With ``target_place_N``, the places of the tokens to predict in B * L, or in B * T, the language model's head, as wide
        as the vocabulary, looks for these alone; nothing else changes by it.
        """
        return {"loss": weighed(self.text_loss(self.model.soft_prompt(self.model.encoded(batch)), batch), batch)}

    def text_loss(self, query_BQD: Tensor | None, batch: dict[str, Any]) -> Tensor:
        """The loss of the texts behind `query_BQD`; None: of the language model that sees no image."""
        language = self.model.language
        if language.is_encoder_decoder:
            prefix = join_prefix(language, query_BQD, batch["input_ids_BL"], batch["input_mask_BL"])
            return output_loss(language, *prefix, batch)
        prefix = join_prefix(language, query_BQD, batch["text_ids_BL"], batch["text_mask_BL"])
        return text_loss(language, *prefix, batch, batch["label_mask_BL"])
