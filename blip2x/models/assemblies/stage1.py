"""Image encoder and Q-Former with the heads of stage 1 (BLIP-2, section 3.1).

B rows, C channels, H height, W width, P patches, D width, Q queries, L text tokens, E width of the shared space.
"""

from __future__ import annotations

from collections.abc import Mapping

import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.config.model import LN_VISION_EPS, ModelConfig
from blip2x.models.qformer.layers import make_linear
from blip2x.models.qformer.qformer import Cache, ImageCache, QFormer, build_qformer
from blip2x.registry import VISION_ENCODERS


class Stage1Model(nn.Layer):
    """Features to contrast, logits to match, and a Q-Former that writes captions.

    Args:
        vision: image encoder.
        qformer: with texts.
        embed_dim: width of the space in which images and texts are compared.
        ln_vision_eps: of the norm behind the image encoder.
        temperature: the learned contrast temperature's start.
    """

    def __init__(self, vision: nn.Layer, qformer: QFormer, *, embed_dim: int, ln_vision_eps: float, temperature: float):
        super().__init__()
        self.vision = vision
        self.ln_vision = nn.LayerNorm(vision.width, epsilon=ln_vision_eps)
        self.qformer = qformer
        self.vision_proj = make_linear(qformer.width, embed_dim, width=qformer.width)
        self.text_proj = make_linear(qformer.width, embed_dim, width=qformer.width)
        self.itm_head = make_linear(qformer.width, 2, width=qformer.width)
        # one axis: paddle's sharding fails on a parameter without any
        self.temp = self.create_parameter([1], default_initializer=nn.initializer.Constant(temperature))

    def encoded(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What the image encoder gives of a batch's images [B, P, D]: ``encoded_BPD`` where it is there, else of the pixels."""
        return batch["encoded_BPD"] if "encoded_BPD" in batch else self.vision(batch["image_BCHW"])

    def image_features(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Patches [B, P, D], the queries' output [B, Q, D], their unit vectors [B, Q, E], and the cache that captions read."""
        patch_BPD = self.ln_vision(self.vision(image_BCHW))
        return patch_BPD, *self.query_features(patch_BPD)

    def query_features(self, image: Tensor | ImageCache) -> tuple[Tensor, Tensor, Cache]:
        """What `image_features` gives of patches [B, P, D] that went through `vision` and `ln_vision`, without these.

        `image` is the patches, or what `qformer.look` made of them.
        """
        query_BQD, cache = self.qformer.encode_image(image)
        return query_BQD, F.normalize(self.vision_proj(query_BQD), axis=-1), cache

    def text_features(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Unit vectors [B, E] of texts that begin with [CLS]."""
        return F.normalize(self.text_proj(self.qformer.encode_text(ids_BL, mask_BL)), axis=-1)

    def itm_logits(self, image: Tensor | ImageCache, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Logits [B, 2] of "does not match" and "matches", the mean over the queries.

        `image` has patches [I, P, D] of as many images as texts, or of fewer: then each is paired with equally many texts, one
        image's after the other's. Where an image is asked about several times, `qformer.look` makes its keys and values once,
        and `image` may be these.
        """
        return self.itm_head(self.qformer.encode_pair(image, ids_BL, mask_BL)).mean(axis=1)


def build_stage1(cfg: ModelConfig, *, vocab_size: int) -> Stage1Model:
    """The stage-1 model of `cfg` with random weights; `vocab_size` is the tokenizer's, where the config leaves it open."""
    vision = VISION_ENCODERS.get(cfg.vision.kind)(cfg.vision)
    qformer = build_qformer(cfg.qformer, vision_width=cfg.vision.width, vocab_size=cfg.qformer.vocab_size or vocab_size)
    return Stage1Model(
        vision,
        qformer,
        embed_dim=cfg.qformer.embed_dim,
        ln_vision_eps=cfg.ln_vision_eps or LN_VISION_EPS,
        temperature=cfg.temperature,
    )
