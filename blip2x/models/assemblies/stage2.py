"""Image encoder, Q-Former and a language model that reads the queries (BLIP-2, section 3.2).

B rows, C channels, H height, W width, P patches, V their width, Q queries, K tokens of a question, L text tokens, S = Q + L,
D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import paddle
from paddle import Tensor, nn

from blip2x.config.model import LN_VISION_EPS, ModelConfig
from blip2x.models.prefix import Prefix, SharedPrefix, SharedQueries, join
from blip2x.models.qformer.layers import make_linear
from blip2x.models.qformer.qformer import ImageCache, QFormer, build_qformer
from blip2x.registry import LANGUAGE_MODELS, VISION_ENCODERS


class Stage2Model(nn.Layer):
    """The queries' outputs, projected to the language model's width, are a soft prompt before its text.

    Args:
        vision: image encoder.
        qformer: without texts; for `encode_asked` with texts.
        language: a language model of blip2x.models.language.
        ln_vision_eps: of the norm behind the image encoder.
    """

    def __init__(self, vision: nn.Layer, qformer: QFormer, language: nn.Layer, *, ln_vision_eps: float):
        super().__init__()
        self.vision = vision
        self.ln_vision = nn.LayerNorm(vision.width, epsilon=ln_vision_eps)
        self.qformer = qformer
        self.language_proj = make_linear(qformer.width, language.width, width=qformer.width)
        self.language = language

    def encoded(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the image encoder gives of a batch's images [B, P, V]: ``encoded_BPD`` where it is there, else of the pixels."""
        return batch["encoded_BPD"] if "encoded_BPD" in batch else self.vision(batch["image_BCHW"])

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """The soft prompt [B, Q, D] of each image."""
        return self.soft_prompt(self.vision(image_BCHW))

    def soft_prompt(self, encoded_BPV: Tensor) -> Tensor:
        """As `encode`, of what the image encoder gave."""
        query, _ = self.qformer.encode_image(self.ln_vision(encoded_BPV))
        return self.language_proj(query)

    def encode_asked(self, image: Tensor | ImageCache, question_ids_BK: Tensor, question_mask_BK: Tensor) -> Tensor:
        """The soft prompt [B, Q, D] of images that are looked at with a question in mind (section 4.3).

        `image` is their patches [B, P, V], or what `qformer.look` made of them, which serves all questions about an image.

        Queries and question see each other, so that the queries look in the image for what is asked; the question's own output
        goes nowhere.
        """
        texts = (question_ids_BK, question_mask_BK)
        return self.language_proj(self.qformer.encode_pair(image, *texts, reaches_all=paddle.is_grad_enabled()))


def join_prefix(language: nn.Layer, query_BQD: Tensor | None, ids_BL: Tensor, mask_BL: Tensor) -> Prefix:
    """Queries and then the text; without queries (None) the text alone, for a reader that sees no image."""
    text_BLD = language.embed(ids_BL)
    if query_BQD is None:
        return text_BLD, mask_BL
    return join(query_BQD, text_BLD, mask_BL)


def shared_prefix(
    language: nn.Layer, queries: SharedQueries, image_B: np.ndarray, ids_BL: Tensor, mask_BL: Tensor
) -> SharedPrefix:
    """As `join_prefix`, where several texts are about one image: text b about the one in row image_B[b] of `queries`."""
    return SharedPrefix(queries, image_B, language.embed(ids_BL), mask_BL)


def build_stage2(cfg: ModelConfig, *, vocab_size: int, question_vocab_size: int | None = None) -> Stage2Model:
    """The stage-2 model of `cfg` with random weights.

    Args:
        cfg: the model.
        vocab_size: of the language model's tokenizer, where the config leaves it open.
        question_vocab_size: the same of the Q-Former's, which then reads questions; None: it reads no texts.
    """
    vision = VISION_ENCODERS.get(cfg.vision.kind)(cfg.vision)
    words = None if question_vocab_size is None else cfg.qformer.vocab_size or question_vocab_size
    qformer = build_qformer(cfg.qformer, vision_width=cfg.vision.width, vocab_size=words, writes=False)
    language = LANGUAGE_MODELS.get(cfg.language.kind)(cfg.language, vocab_size)
    return Stage2Model(vision, qformer, language, ln_vision_eps=cfg.ln_vision_eps or LN_VISION_EPS)
