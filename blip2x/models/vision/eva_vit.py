"""EVA-CLIP's vision transformer (Fang et al., 2023, arXiv 2211.07636), whose features BLIP-2 reads.

B images, C colours, H and W pixels, P = 1 + (image / patch)^2 patches with the class token, D width.
"""

from __future__ import annotations

from functools import partial

import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.config.model import EvaVitConfig
from blip2x.models.vision._blocks import Block, Blocks, InitialStd, PatchEmbedding, drop_path_rates
from blip2x.models.vision._positions import interpolate_positions
from blip2x.models.weights.checkpoint import Adapt
from blip2x.parallel.context import TensorGroup
from blip2x.registry import VISION_ENCODERS

STD = 0.02


class EvaVit(nn.Layer):
    """A pre-norm vision transformer with exact GELU, and no norm before or after its blocks.

    Args:
        image_size: pixels of a side.
        patch_size: pixels of a patch's side.
        width: of the features.
        depth: number of blocks; BLIP-2 leaves the published encoder's last one out.
        num_heads: of every attention.
        mlp_width: inside the blocks.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 and acts only in training mode.
        recompute: compute the blocks' insides again in the backward pass, to save memory when they are trained.
        key_bias: whether keys have biases, which EVA's have not.

    Raises:
        UserError: patches that do not cover the image, or heads that do not divide the width.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        drop_path_rate: float,
        recompute: bool,
        key_bias: bool = False,
    ):
        super().__init__()
        self.width, self.image_size, self.patch_size = width, image_size, patch_size
        self.embeddings = PatchEmbedding(image_size=image_size, patch_size=patch_size, width=width, bias=True, std=STD)
        self.blocks = Blocks(
            (
                Block(
                    width=width,
                    num_heads=num_heads,
                    mlp_width=mlp_width,
                    key_bias=key_bias,
                    activation=F.gelu,
                    epsilon=1e-6,
                    drop_path_rate=rate,
                    std=_initial_std(index),
                )
                for index, rate in enumerate(drop_path_rates(drop_path_rate, depth))
            ),
            recompute=recompute,
        )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, P, D] of normalised square images of `image_size`, the class token's first."""
        return self.blocks(self.embeddings(image_BCHW))

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of the blocks; before the model has memory (`tensor_parallel`)."""
        self.blocks.split_over(group)

    def adapters(self) -> dict[str, Adapt]:
        """By parameter, how weights of another image size are brought to this one's (`adapt` of `load_checkpoint`)."""
        return {"embeddings.positions": partial(interpolate_positions, align_corners=False)}


def _initial_std(index: int) -> InitialStd:
    """What ends in the residual sum is drawn smaller block by block, so that the sum does not grow with depth."""
    into_sum = STD / (2 * (index + 1)) ** 0.5
    return InitialStd(qkv=STD, out=into_sum, fc1=STD, fc2=into_sum)


@VISION_ENCODERS.register("eva_vit")
def build(cfg: EvaVitConfig) -> EvaVit:
    """Build the encoder of `cfg` with random weights."""
    return EvaVit(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        width=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_width=cfg.mlp_width,
        drop_path_rate=cfg.drop_path_rate,
        recompute=cfg.recompute,
        key_bias=cfg.key_bias,
    )
