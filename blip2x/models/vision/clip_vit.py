"""CLIP's vision transformer (Radford et al., 2021, arXiv 2103.00020), BLIP-2's other image encoder.

B images, C colours, H and W pixels, P = 1 + (image / patch)^2 patches with the class token, D width, M MLP width.
"""

from __future__ import annotations

from functools import partial

import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.config.model import ClipVitConfig
from blip2x.models.vision._blocks import Block, Blocks, InitialStd, PatchEmbedding, drop_path_rates
from blip2x.models.vision._positions import interpolate_positions
from blip2x.models.weights.checkpoint import Adapt
from blip2x.parallel.context import TensorGroup
from blip2x.registry import VISION_ENCODERS

EPSILON = 1e-5


class ClipVit(nn.Layer):
    """A pre-norm vision transformer with QuickGELU and a norm before its blocks; CLIP's norm behind them is left out.

    Args:
        image_size: pixels of a side.
        patch_size: pixels of a patch's side.
        width: of the features.
        depth: number of blocks; BLIP-2 leaves the published encoder's last one out.
        num_heads: of every attention.
        mlp_width: inside the blocks.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0 and acts only in training mode.
        recompute: compute the blocks' insides again in the backward pass, to save memory when they are trained.

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
    ):
        super().__init__()
        self.width, self.image_size, self.patch_size = width, image_size, patch_size
        std = _initial_std(width, depth)
        self.embeddings = PatchEmbedding(image_size=image_size, patch_size=patch_size, width=width, bias=False, std=width**-0.5)
        self.norm = nn.LayerNorm(width, epsilon=EPSILON)
        self.blocks = Blocks(
            (
                Block(
                    width=width,
                    num_heads=num_heads,
                    mlp_width=mlp_width,
                    key_bias=True,
                    activation=quick_gelu,
                    epsilon=EPSILON,
                    drop_path_rate=rate,
                    std=std,
                )
                for rate in drop_path_rates(drop_path_rate, depth)
            ),
            recompute=recompute,
        )

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Features [B, P, D] of normalised square images of `image_size`, the class token's first."""
        return self.blocks(self.norm(self.embeddings(image_BCHW)))

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of the blocks; before the model has memory (`tensor_parallel`)."""
        self.blocks.split_over(group)

    def adapters(self) -> dict[str, Adapt]:
        """By parameter, how weights of another image size are brought to this one's (`adapt` of `load_checkpoint`)."""
        return {"embeddings.positions": partial(interpolate_positions, align_corners=True)}


def quick_gelu(hidden_BPM: Tensor) -> Tensor:
    """The approximation of GELU that CLIP was trained with; the exact one gives other features."""
    return hidden_BPM * F.sigmoid(1.702 * hidden_BPM)


def _initial_std(width: int, depth: int) -> InitialStd:
    """As in CLIP's code: what ends in the residual sum is drawn smaller, so that the sum does not grow with depth."""
    into_sum = (2 * depth * width) ** -0.5
    return InitialStd(qkv=width**-0.5, out=into_sum, fc1=(2 * width) ** -0.5, fc2=into_sum)


@VISION_ENCODERS.register("clip_vit")
def build(cfg: ClipVitConfig) -> ClipVit:
    """Build the encoder of `cfg` with random weights."""
    return ClipVit(
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        width=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_width=cfg.mlp_width,
        drop_path_rate=cfg.drop_path_rate,
        recompute=cfg.recompute,
    )
