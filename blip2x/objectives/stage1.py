"""Stage 1, section 3.1 of the BLIP-2 paper: images and texts are contrasted, matched, and captions written.

B pairs of a micro-batch, K pairs that are compared (of all ranks; with cached contrast of all micro-batches, too), Q queries,
P patches, D width of the image encoder, E width of the shared space, L text tokens, N tokens to predict, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import paddle
from paddle import Tensor, nn

from blip2x.config.task import PretrainStage1Config
from blip2x.losses.itc import contrast_targets, itc_loss, same_image, similarities
from blip2x.losses.itm import draw_negatives, itm_loss
from blip2x.losses.lm import lm_loss, target_labels
from blip2x.models.places import at_places
from blip2x.models.precision import without_autocast
from blip2x.models.qformer.qformer import rows_of
from blip2x.objectives.cached import Cached, Others, choose, drawing_from
from blip2x.objectives.tokens import padded, weighed, with_token_shares
from blip2x.parallel.context import Context

TEMPERATURE_RANGE = (0.001, 0.5)  # as in ALBEF and BLIP; a step across 0 would turn the contrast around for good


class Negatives(NamedTuple):
    """Another image for each text and another text for each image: places among the K pairs [B], and whether there is one."""

    image_B: Tensor
    has_image_B: Tensor
    text_B: Tensor
    has_text_B: Tensor


class Features(NamedTuple):
    """What all three losses take from a micro-batch."""

    image: Any  # keys and values of the patches, which pairs look at, too
    image_BQE: Tensor
    text_BE: Tensor
    cache: Any  # which captions read


class Scores(NamedTuple):
    """Scores of images with texts and of texts with images, and whether both are of one image."""

    i2t_BK: Tensor
    t2i_BK: Tensor
    same_BK: Tensor


class Stage1Objective(nn.Layer):
    """ITC + ITM + captioning (ITG); each image goes through the image encoder and its queries once for all three.

    Its patches, too, are made keys and values once, for its own queries and for all pairs in which it is matched; only images
    that come from other ranks or other micro-batches are made keys and values again.

    The mean of the losses over ranks, and its gradient, are those of one process that has the pairs of all ranks. Each rank has
    equally many rows of scores, and means per token are weighed (`prepare`), so the losses' mean is that of all rows. What a
    loss teaches another rank's features goes back to that rank and is summed there with its own; data parallelism then takes
    the mean of the parameters' gradients, which divides that sum by the number of ranks, as the mean of the losses does.

    With ``cfg.gather_gradient`` a score teaches both of its sides. Without, as in LAVIS, the side that was gathered is a
    constant: a feature learns from its own row of scores alone, of one rank as of many.

    Several ranks pad the texts that they exchange to ``cfg.max_txt_len``, as none knows the others' lengths, and match their
    own pairs at that length, too. Padding is masked, so scores are the same to rounding; what dropout draws is not.

    With ``cfg.cached_contrast`` all that holds for the pairs of all micro-batches of a step; see blip2x/objectives/cached.py.

    Args:
        model: a `Stage1Model`.
        context: the ranks whose pairs serve as each other's negatives.
        cfg: weights of the three losses, label smoothing, and how pairs are compared.
        dec_id: the token in the place of [CLS] that asks for a caption.
    """

    def __init__(self, model: nn.Layer, context: Context, cfg: PretrainStage1Config, *, dec_id: int):
        super().__init__()
        self.model = model
        self._context = context
        self._cfg = cfg
        self._dec_id = dec_id
        self.mixes_samples = not cfg.cached_contrast
        self.gradients_vary = cfg.contrast_steps > 0 and cfg.itm_weight + cfg.lm_weight > 0  # for data parallelism
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Say how many optimizer steps are done: matching and captioning join in after `contrast_steps`."""
        self._contrast_only = step < self._cfg.contrast_steps

    def prepare(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """This rank's micro-batches of a step -> the same with what `forward` must know of the others.

        To be called after `set_step`, under the same precision as `forward`. All ranks have equally many, of equal sizes.
        """
        counts = [batch["text_mask_BL"][:, 1:].sum() for batch in batches]  # nothing comes before [DEC]
        batches = with_token_shares(batches, counts, self._context)
        if not self._cfg.cached_contrast:
            return batches
        return [{**batch, "cached": cached} for batch, cached in zip(batches, self._look_ahead(batches), strict=True)]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """``image_BCHW``, ``image_id_B``, ``text_ids_BL``, ``text_mask_BL`` ([CLS] first, padded on the right) -> the parts.

        With ``encoded_BPD``, what a frozen image encoder gives, the images themselves are not needed.

        Ranks exchange their pairs as negatives, so B is the same everywhere; L, at most ``cfg.max_txt_len``, is not. With
        ``negative_image_B`` and ``negative_text_B``, places among the K pairs, these are the negatives to match, and none are
        drawn. Places count ranks, then micro-batches where these are compared with each other, then pairs. With
        ``target_place_N``, the places of the tokens to predict in B * (L - 1), [CLS] left out, the wide head of the captions
        looks at these alone; nothing else changes by it.

        ``loss`` is their weighted sum; ``itc``, ``itm`` and ``lm`` are unweighted; ``itm_accuracy`` and ``temperature`` only
        inform. What has weight 0, or has not joined in yet, is not computed.
        """
        cached: Cached | None = batch.get("cached")
        temperature = self._temperature()
        if cached is None:
            encoded_BPD = self.model.encoded(batch)
            features = self._features(encoded_BPD, batch)
            itc, scores = self._contrast(features.image_BQE, features.text_BE, batch["image_id_B"], temperature)
        else:
            with drawing_from(cached.generator_state):  # the same dropout as when the gradients were computed
                encoded_BPD = self._encoded(cached.encoded_BPD, batch.get("image_BCHW"))
                features = self._features(encoded_BPD, batch)
            itc = cached.contrast(features.image_BQE, features.text_BE, temperature)

        parts = {"loss": self._cfg.itc_weight * itc, "itc": itc, "temperature": temperature.detach()}
        if self._matches():
            others = self._others(batch, encoded_BPD, self._negatives([batch], scores)) if cached is None else cached.others
            itm, accuracy = self._match(features.image, batch, others)
            parts |= {"loss": parts["loss"] + self._cfg.itm_weight * itm, "itm": itm, "itm_accuracy": accuracy}
        if self._cfg.lm_weight and not self._contrast_only:
            lm = weighed(self._caption(batch, features.cache), batch)
            parts |= {"loss": parts["loss"] + self._cfg.lm_weight * lm, "lm": lm}
        return parts

    def _matches(self) -> bool:
        return self._cfg.itm_weight > 0 and not self._contrast_only

    def _temperature(self) -> Tensor:
        temperature = self.model.temp
        if self.training:
            with paddle.no_grad():  # the parameter itself, so that its gradient still flows at the bounds
                temperature.set_value(temperature.clip(*TEMPERATURE_RANGE))
        return temperature

    def _frozen(self) -> bool:
        """Whether nothing of the image encoder is trained: its output never changes and no gradient goes there."""
        return all(parameter.stop_gradient for parameter in self.model.vision.parameters())

    def _encoded(self, encoded_BPD: Tensor | None, image_BCHW: Tensor | None) -> Tensor:
        return self.model.vision(image_BCHW) if encoded_BPD is None else encoded_BPD

    def _features(self, encoded_BPD: Tensor, batch: dict[str, Any]) -> Features:
        image = self.model.qformer.look(self.model.ln_vision(encoded_BPD))
        _, image_BQE, cache = self.model.query_features(image)
        text_BE = self.model.text_features(batch["text_ids_BL"], batch["text_mask_BL"])
        return Features(image, image_BQE, text_BE, cache)

    def _contrast(self, image_BQE: Tensor, text_BE: Tensor, image_id_B: Tensor, temperature: Tensor) -> tuple[Tensor, Scores]:
        """ITC loss of this rank's rows of scores, and the scores."""
        gather = self._context.all_gather_with_grad if self._cfg.gather_gradient else self._context.all_gather
        i2t_BK, t2i_BK = similarities(image_BQE, text_BE, gather(image_BQE), gather(text_BE), temperature)
        same_BK = same_image(image_id_B, self._context.all_gather(image_id_B))
        itc = itc_loss(i2t_BK, t2i_BK, contrast_targets(same_BK, self._cfg.label_smoothing))
        return itc, Scores(i2t_BK, t2i_BK, same_BK)

    def _negatives(self, batches: Sequence[dict[str, Any]], scores: Scores) -> Negatives:
        """Of the rows of `scores`, which are `batches` one after the other."""
        if "negative_image_B" in batches[0]:
            image_B, text_B = (paddle.concat([b[f"negative_{kind}_B"] for b in batches]) for kind in ("image", "text"))
            all_B = paddle.ones(image_B.shape, dtype="bool")
            return Negatives(image_B, all_B, text_B, all_B)
        images = draw_negatives(scores.t2i_BK, scores.same_BK)
        return Negatives(*images, *draw_negatives(scores.i2t_BK, scores.same_BK))

    def _others(self, batch: dict[str, Any], encoded_BPD: Tensor, negatives: Negatives) -> Others:
        """The negatives, from all ranks; images of this rank alone are those of the batch, whose keys and values are there.

        Each rank puts its own through `ln_vision`, whose gradient is summed over ranks like any other parameter's. So a frozen
        encoder's output needs no gradient, and the widest tensor of all goes between ranks once instead of twice.
        """
        encoded, place = None, negatives.image_B
        if self._context.data_size > 1:
            gather = self._context.all_gather if self._frozen() else self._context.all_gather_with_grad
            encoded, place = gather(encoded_BPD).index_select(negatives.image_B), None
        length = self._length([batch])
        ids_BL, mask_BL = (
            self._context.all_gather(padded(batch[name], length)).index_select(negatives.text_B)
            for name in ("text_ids_BL", "text_mask_BL")
        )
        return Others(place, encoded, None, negatives.has_image_B, ids_BL, mask_BL, negatives.has_text_B)

    def _length(self, batches: Sequence[dict[str, Any]]) -> int:
        """Tokens of the texts that `batches` exchange; a rank knows no other's lengths, and to ask would mean to wait."""
        longest = max(batch["text_ids_BL"].shape[1] for batch in batches)
        return longest if self._context.data_size == 1 else max(longest, self._cfg.max_txt_len)

    def _match(self, image: Any, batch: dict[str, Any], others: Others) -> tuple[Tensor, Tensor]:
        """ITM loss and accuracy of each pair, of its image with a hard negative text, and of its text with such an image.

        A pair has no negatives only where all images are the same, and then none has: equally many count everywhere.
        """
        ids_BL, mask_BL = batch["text_ids_BL"], batch["text_mask_BL"]
        length = others.ids_BL.shape[1]
        own_N2 = self.model.itm_logits(
            image,
            _by_turns(padded(ids_BL, length), others.ids_BL),
            _by_turns(padded(mask_BL, length), others.mask_BL),
        )
        other_N2 = self.model.itm_logits(self._other_image(image, others), ids_BL, mask_BL)
        matched_B = paddle.ones([ids_BL.shape[0]], dtype="int64")
        label_N = paddle.concat([_by_turns(matched_B, 0 * matched_B), 0 * matched_B])
        counts_N = paddle.concat([_by_turns(matched_B.astype("bool"), others.has_text_B), others.has_image_B])
        return itm_loss(paddle.concat([own_N2, other_N2]), label_N, counts_N)

    def _other_image(self, image: Any, others: Others) -> Any:
        """Keys and values of the images that are matched with the texts."""
        if others.place_B is None:
            return self.model.qformer.look(self.model.ln_vision(self._encoded(others.encoded_BPD, others.image_BCHW)))
        return rows_of(image, others.place_B)

    def _caption(self, batch: dict[str, Any], cache: Any) -> Tensor:
        ids_BL, mask_BL, place_N = batch["text_ids_BL"], batch["text_mask_BL"], batch.get("target_place_N")
        # [DEC] replaces [CLS]: this pass writes, it does not sum up. Nothing is predicted from the last token.
        decoder_ids_BL = paddle.concat([paddle.full_like(ids_BL[:, :1], self._dec_id), ids_BL[:, 1:-1]], axis=1)
        logits = self.model.qformer.caption_logits(decoder_ids_BL, mask_BL[:, :-1], cache, place_N)
        label_BL = target_labels(ids_BL, mask_BL)[:, 1:]
        return lm_loss(logits, at_places(label_BL, place_N), self._cfg.label_smoothing)

    @paddle.no_grad()
    def _look_ahead(self, batches: Sequence[dict[str, Any]]) -> list[Cached]:
        """Contrast all micro-batches of all ranks with each other."""
        frozen, states, encoded, images, texts = self._frozen(), [], [], [], []
        for batch in batches:
            encoded.append(self.model.encoded(batch) if frozen else None)
            states.append(paddle.get_rng_state())
            features = self._features(self._encoded(encoded[-1], batch.get("image_BCHW")), batch)
            images.append(features.image_BQE)
            texts.append(features.text_BE)
        sides = [paddle.concat(images).astype("float32"), paddle.concat(texts).astype("float32"), self._temperature().detach()]
        for side in sides:
            side.stop_gradient = False
        with paddle.enable_grad():
            itc, scores = self._contrast(
                sides[0], sides[1], paddle.concat([batch["image_id_B"] for batch in batches]), sides[2]
            )
            with without_autocast():  # as around backward()
                *gradients, temperature_gradient = paddle.grad(itc, sides)
        # A feature is in one of the micro-batches, over which the loop will take the mean; the temperature is in all.
        image_gradients, text_gradients = ((gradient * len(batches)).split(len(batches)) for gradient in gradients)
        others = self._choose(batches, encoded, self._negatives(batches, scores)) if self._matches() else [None] * len(batches)
        columns = zip(encoded, states, image_gradients, text_gradients, others, strict=True)
        return [
            Cached(encoded_BPD, state, itc.detach(), image_gradient, text_gradient, temperature_gradient, other)
            for encoded_BPD, state, image_gradient, text_gradient, other in columns
        ]

    def _choose(
        self, batches: Sequence[dict[str, Any]], encoded: Sequence[Tensor | None], negatives: Negatives
    ) -> list[Others]:
        """The negatives of each micro-batch, from all micro-batches of all ranks."""

        def chosen(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
            return choose(tensors, index, self._context)

        unknown, length = [None] * len(batches), self._length(batches)
        columns = [
            unknown,
            unknown if encoded[0] is None else chosen(encoded, negatives.image_B),
            chosen([batch["image_BCHW"] for batch in batches], negatives.image_B) if encoded[0] is None else unknown,
            negatives.has_image_B.split(len(batches)),
            chosen([padded(batch["text_ids_BL"], length) for batch in batches], negatives.text_B),
            chosen([padded(batch["text_mask_BL"], length) for batch in batches], negatives.text_B),
            negatives.has_text_B.split(len(batches)),
        ]
        return [Others(*column) for column in zip(*columns, strict=True)]


def _by_turns(one_B: Tensor, other_B: Tensor) -> Tensor:
    """Row 0 of each, row 1 of each, and so on: [2B, ...]."""
    return paddle.stack([one_B, other_B], axis=1).flatten(stop_axis=1)
