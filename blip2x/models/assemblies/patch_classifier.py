"""An image encoder with a linear classifier per kind of label on each patch: how the demo fits its encoder.

B images, C channels, H height, W width, P patches, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from paddle import Tensor, nn


class PatchClassifier(nn.Layer):
    """`classes` maps the name of a label to its number of classes."""

    def __init__(self, vision: nn.Layer, classes: Mapping[str, int]):
        super().__init__()
        self.vision = vision
        self.norm = nn.LayerNorm(vision.width)
        self.heads = nn.LayerDict({name: nn.Linear(vision.width, count) for name, count in classes.items()})

    def forward(self, image_BCHW: Tensor) -> dict[str, Tensor]:
        """Name -> logits [B, P, K] of the patches, the class token left out."""
        patch_BPD = self.norm(self.vision(image_BCHW)[:, 1:])
        return {name: head(patch_BPD) for name, head in self.heads.items()}
