"""Stage 1, section 3.1 of the BLIP-2 paper: images and texts are contrasted, matched, and captions written.

B pairs on this rank, K pairs on all ranks, Q queries, P patches, D width of the image encoder, E width of the shared space,
L text tokens, V vocabulary.
"""

from __future__ import annotations

import paddle
from paddle import Tensor, nn

from blip2x.config.task import PretrainStage1Config
from blip2x.losses.itc import contrast_targets, itc_loss, same_image, similarities
from blip2x.losses.itm import draw_negatives, itm_loss
from blip2x.losses.lm import lm_loss, target_labels
from blip2x.parallel.context import Context

Negatives = tuple[Tensor, Tensor]  # places among all pairs [B], and whether there is one [B]

TEMPERATURE_RANGE = (0.001, 0.5)  # as in ALBEF and BLIP; a step across 0 would turn the contrast around for good


class Stage1Objective(nn.Layer):
    """ITC + ITM + captioning (ITG); each image goes through the image encoder and its queries once for all three.

    Args:
        model: a `Stage1Model`.
        context: the ranks whose pairs serve as each other's negatives.
        cfg: weights of the three losses, label smoothing.
        dec_id: the token in the place of [CLS] that asks for a caption.
    """

    def __init__(self, model: nn.Layer, context: Context, cfg: PretrainStage1Config, *, dec_id: int):
        super().__init__()
        self.model = model
        self._context = context
        self._cfg = cfg
        self._dec_id = dec_id
        self.gradients_vary = cfg.contrast_steps > 0 and cfg.itm_weight + cfg.lm_weight > 0  # for data parallelism
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Say how many optimizer steps are done: matching and captioning join in after `contrast_steps`."""
        self._contrast_only = step < self._cfg.contrast_steps

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``image_BCHW``, ``image_id_B``, ``text_ids_BL``, ``text_mask_BL`` ([CLS] first, padded on the right) -> the parts.

        Ranks exchange their texts as negatives, so B and L are the same everywhere. With ``negative_image_B`` and
        ``negative_text_B``, places among all ranks' pairs, these are the negatives to match, and none are drawn.

        ``loss`` is their weighted sum; ``itc``, ``itm`` and ``lm`` are unweighted; ``itm_accuracy`` and ``temperature`` only
        inform. What has weight 0, or has not joined in yet, is not computed.
        """
        ids_BL, mask_BL = batch["text_ids_BL"], batch["text_mask_BL"]
        temperature = self._temperature()
        patch_BPD, _, image_BQE, cache = self.model.image_features(batch["image_BCHW"])
        text_BE = self.model.text_features(ids_BL, mask_BL)
        # As in LAVIS, the other side of a comparison is a constant: each feature learns from its own row of scores.
        gather = self._context.all_gather
        i2t_BK, t2i_BK = similarities(image_BQE, text_BE, gather(image_BQE), gather(text_BE), temperature)
        same_BK = same_image(batch["image_id_B"], gather(batch["image_id_B"]))

        itc = itc_loss(i2t_BK, t2i_BK, contrast_targets(same_BK, self._cfg.label_smoothing))
        parts = {"loss": self._cfg.itc_weight * itc, "itc": itc, "temperature": temperature.detach()}
        if self._cfg.itm_weight and not self._contrast_only:
            negatives = self._negatives(batch, i2t_BK, t2i_BK, same_BK)
            itm, accuracy = self._match(patch_BPD, ids_BL, mask_BL, *negatives)
            parts |= {"loss": parts["loss"] + self._cfg.itm_weight * itm, "itm": itm, "itm_accuracy": accuracy}
        if self._cfg.lm_weight and not self._contrast_only:
            lm = self._caption(ids_BL, mask_BL, cache)
            parts |= {"loss": parts["loss"] + self._cfg.lm_weight * lm, "lm": lm}
        return parts

    def _temperature(self) -> Tensor:
        temperature = self.model.temp
        if self.training:
            with paddle.no_grad():  # the parameter itself, so that its gradient still flows at the bounds
                temperature.set_value(temperature.clip(*TEMPERATURE_RANGE))
        return temperature

    def _negatives(
        self, batch: dict[str, Tensor], i2t_BK: Tensor, t2i_BK: Tensor, same_BK: Tensor
    ) -> tuple[Negatives, Negatives]:
        """Another image for each text and another text for each image."""
        if "negative_image_B" in batch:
            all_B = paddle.ones(batch["negative_image_B"].shape, dtype="bool")
            return (batch["negative_image_B"], all_B), (batch["negative_text_B"], all_B)
        return draw_negatives(t2i_BK, same_BK), draw_negatives(i2t_BK, same_BK)

    def _match(
        self, patch_BPD: Tensor, ids_BL: Tensor, mask_BL: Tensor, images: Negatives, texts: Negatives
    ) -> tuple[Tensor, Tensor]:
        """ITM loss and accuracy of each pair, of its text with a hard negative image, and of its image with such a text."""
        (image_index_B, has_image_B), (text_index_B, has_text_B) = images, texts
        other_patch_BPD = self._context.all_gather_with_grad(patch_BPD).index_select(image_index_B)
        other_ids_BL = self._context.all_gather(ids_BL).index_select(text_index_B)
        other_mask_BL = self._context.all_gather(mask_BL).index_select(text_index_B)
        logits_N2 = self.model.itm_logits(
            paddle.concat([patch_BPD, other_patch_BPD, patch_BPD]),
            paddle.concat([ids_BL, ids_BL, other_ids_BL]),
            paddle.concat([mask_BL, mask_BL, other_mask_BL]),
        )
        matched_B = paddle.ones_like(image_index_B)
        label_N = paddle.concat([matched_B, 0 * matched_B, 0 * matched_B])
        return itm_loss(logits_N2, label_N, paddle.concat([matched_B.astype("bool"), has_image_B, has_text_B]))

    def _caption(self, ids_BL: Tensor, mask_BL: Tensor, cache: object) -> Tensor:
        # [DEC] replaces [CLS]: this pass writes, it does not sum up.
        decoder_ids_BL = paddle.concat([paddle.full_like(ids_BL[:, :1], self._dec_id), ids_BL[:, 1:]], axis=1)
        logits_BLV = self.model.qformer.caption_logits(decoder_ids_BL, mask_BL, cache)
        label_BL = target_labels(decoder_ids_BL, mask_BL)
        return lm_loss(logits_BLV[:, :-1], label_BL[:, 1:], self._cfg.label_smoothing)
