"""A BLIP-2 of stage 1: it compares images and texts, and writes captions with the Q-Former alone.

B images, N texts, Q queries, P patches, L text tokens, E width of the shared space, R results per image, T new tokens,
V width of the image encoder, D width of the Q-Former.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import paddle
from paddle import Tensor

from blip2x.api.inputs import PictureReader, as_texts, ids_and_mask
from blip2x.api.writing import Generated, Images
from blip2x.config.task import PretrainStage1Config
from blip2x.data.tokenize import TextTokenizer
from blip2x.errors import UserError
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.qformer.captioner import QFormerCaptioner
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.parallel.context import Context

Texts = str | Sequence[str]


class MatchingModel:
    """Image encoder and Q-Former with the heads of stage 1, in evaluation mode.

    Texts are given as such, where a tokenizer came with the weights, or as ids that begin with [CLS], padded on the right.

    Attributes:
        network: the `Stage1Model`, a paddle layer.
        report: what was loaded from where, line by line.
    """

    def __init__(
        self,
        network: Stage1Model,
        reader: PictureReader,
        tokenizer: TextTokenizer | None,
        *,
        report: list[str],
        writes: bool,
    ):
        self.network = network
        self.report = report
        self._reader = reader
        self._tokenizer = tokenizer
        self._writes = writes
        self._vocab_size = network.qformer.text.word_embeddings.weight.shape[0]
        self._dec_id = tokenizer.dec_id if tokenizer else self._vocab_size - 1  # the row that BLIP-2 adds to BERT's

    def __call__(
        self,
        images: Images | None = None,
        texts: Texts | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        image_ids: np.ndarray | None = None,
        negatives: tuple[np.ndarray, np.ndarray] | None = None,
        label_smoothing: float = 0.1,
    ) -> dict[str, Tensor]:
        """The losses of stage 1 (BLIP-2, section 3.1) of B pairs: "itc", "itm", "itg", and their sum "loss", with gradients.

        Args:
            images: PIL pictures.
            texts: a text for each.
            pixel_values: or arrays [B, 3, S, S], resized and normalised.
            input_ids: or the texts' ids [B, L].
            attention_mask: of `input_ids`, 1 on tokens and 0 on padding; None: all count.
            image_ids: whole numbers [B]; pairs with equal ones show the same image, and are no negatives of each other. None:
                all differ.
            negatives: for each pair the places of another image and of another text in the batch, [B] each; None: hard ones
                are drawn by similarity.
            label_smoothing: of contrast and captions, 0.1 in the paper's code.

        Raises:
            UserError: inputs that do not fit each other or the model.
        """
        image_BCHW = self._reader(images, pixel_values)
        ids_BL, mask_BL = self._texts(texts, input_ids, attention_mask)
        _require_pairs(image_BCHW, ids_BL)
        pairs = ids_BL.shape[0]
        numbers = np.arange(pairs) if image_ids is None else _numbers("image_ids", image_ids, pairs)
        batch = {
            "image_BCHW": image_BCHW,
            "image_id_B": paddle.to_tensor(numbers),
            "text_ids_BL": ids_BL,
            "text_mask_BL": mask_BL,
        }
        if negatives is not None:
            for key, places in zip(("negative_image_B", "negative_text_B"), negatives, strict=True):
                batch[key] = paddle.to_tensor(_numbers("negatives", places, pairs, below=pairs))
        task = PretrainStage1Config(
            itc_weight=1.0,
            itm_weight=1.0,
            lm_weight=1.0,
            contrast_steps=0,
            label_smoothing=label_smoothing,
            gather_gradient=False,  # as in LAVIS, whose losses and gradients these are
            cached_contrast=False,
        )
        parts = Stage1Objective(self.network, Context(), task, dec_id=self._dec_id)(batch)
        return {"loss": parts["loss"], "itc": parts["itc"], "itm": parts["itm"], "itg": parts["lm"]}

    @paddle.no_grad()
    def encode_image(
        self,
        images: Images | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        output: Literal["queries", "patches", "projected"] = "queries",
    ) -> np.ndarray:
        """What the model sees in images, float32.

        Args:
            images: PIL pictures.
            pixel_values: or arrays [B, 3, S, S], resized and normalised.
            output: "queries" [B, Q, D], the Q-Former's output; "patches" [B, P, V], the image encoder's behind `ln_vision`;
                "projected" [B, Q, E], unit vectors to compare with those of texts.
        """
        if output not in ("queries", "patches", "projected"):
            raise UserError(f"output={output!r} is none of queries, patches, projected")
        patches, queries, units, _ = self.network.image_features(self._reader(images, pixel_values))
        return {"patches": patches, "queries": queries, "projected": units}[output].astype("float32").numpy()

    @paddle.no_grad()
    def encode_text(
        self,
        texts: Texts | None = None,
        *,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Unit vectors [N, E] of texts, float32."""
        return self.network.text_features(*self._texts(texts, input_ids, attention_mask)).astype("float32").numpy()

    def itc(
        self,
        images: Images | None = None,
        texts: Texts | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Similarities [B, N] of all images with all texts, -1 to 1: the cosine of an image's best query, no temperature."""
        image_BQE = self.encode_image(images, pixel_values=pixel_values, output="projected")
        text_NE = self.encode_text(texts, input_ids=input_ids, attention_mask=attention_mask)
        return np.einsum("bqe,ne->bnq", image_BQE, text_NE).max(axis=2)

    @paddle.no_grad()
    def itm(
        self,
        images: Images | None = None,
        texts: Texts | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits [B, 2] of "does not match" and "matches" for image b with text b, float32; softmax gives probabilities."""
        image_BCHW = self._reader(images, pixel_values)
        ids_BL, mask_BL = self._texts(texts, input_ids, attention_mask)
        _require_pairs(image_BCHW, ids_BL)
        patch_BPV = self.network.ln_vision(self.network.vision(image_BCHW))
        return self.network.itm_logits(patch_BPV, ids_BL, mask_BL).astype("float32").numpy()

    @paddle.no_grad()
    def generate(
        self,
        images: Images | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        return_output: bool = False,
        **options: Any,
    ) -> list[str] | np.ndarray | Generated:
        """Captions that the Q-Former writes alone; options, shapes and results as of `WritingModel.generate`, without a prompt.

        Raises:
            UserError: the weights have no head to write with, or options that exclude each other.
        """
        if not self._writes:
            raise UserError("these weights have no head to write captions with; take a LAVIS stage-1 file, or a stage-2 model")
        if self._tokenizer is None and (eos_token_id is None or pad_token_id is None):
            raise UserError("this model has no tokenizer, as none came with its weights; give eos_token_id= and pad_token_id=")
        settings = GenerationSettings(**{"max_new_tokens": 30, **options})
        *_, cache = self.network.image_features(self._reader(images, pixel_values))
        decoder = QFormerCaptioner(self.network.qformer, dec_id=self._dec_id)
        out = generate(
            decoder,
            cache,
            settings,
            eos_id=self._tokenizer.end_id if eos_token_id is None else eos_token_id,
            pad_id=self._tokenizer.pad_id if pad_token_id is None else pad_token_id,
            start_id=decoder.start_id,
        )
        texts = [self._tokenizer.decode(row) for row in out.ids] if self._tokenizer else None
        if return_output:
            return Generated(texts, out.ids, out.scores)
        return out.ids if texts is None else texts

    def _texts(self, texts: Texts | None, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
        if (texts is None) == (input_ids is None):
            raise UserError("give either texts= or input_ids=, and not both")
        if input_ids is None:
            if self._tokenizer is None:
                raise UserError(
                    "this model has no tokenizer, as none came with its weights; give input_ids= in place of texts="
                )
            input_ids, attention_mask = self._tokenizer.encode(as_texts(texts), max_length=None)
        return ids_and_mask(input_ids, attention_mask, self._vocab_size)


def _numbers(name: str, values: Any, pairs: int, below: int | None = None) -> np.ndarray:
    """One whole number for each pair, int64."""
    array = np.asarray(values)
    if array.shape != (pairs,) or array.dtype.kind not in "iu":
        raise UserError(f"{name} has shape {list(array.shape)} and type {array.dtype}, but has to be {pairs} whole numbers")
    if below is not None and not (array.min() >= 0 and array.max() < below):
        raise UserError(f"{name} holds {array.min()} to {array.max()}, but the places of {pairs} pairs are 0 to {below - 1}")
    return array.astype(np.int64)


def _require_pairs(image_BCHW: Tensor, ids_BL: Tensor) -> None:
    if image_BCHW.shape[0] != ids_BL.shape[0]:
        raise UserError(f"{image_BCHW.shape[0]} images and {ids_BL.shape[0]} texts are no pairs; give as many of both")
