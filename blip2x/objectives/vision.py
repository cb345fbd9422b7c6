"""Fit an image encoder on labels of its patches: what the demo's eye learns before it is frozen.

B images, P patches, C classes.
"""

from __future__ import annotations

import paddle
from paddle import Tensor, nn

from blip2x.losses.lm import lm_loss


class VisionObjective(nn.Layer):
    """Cross-entropy of each kind of label on each patch, added up over the kinds.

    Class 0 is "nothing here". Accuracies are of the patches that show something; most do not, and guessing so is easy.
    """

    def __init__(self, model: nn.Layer):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """``image_BCHW`` and ``label_<name>_BP`` per head (-100: no label) -> ``loss``, ``<name>``, ``<name>_accuracy``."""
        parts: dict[str, Tensor] = {}
        losses = []
        for name, logits_BPC in self.model(batch["image_BCHW"]).items():
            label_BP = batch[f"label_{name}_BP"]
            shown_BP = (label_BP > 0).astype("float32")
            right_BP = (logits_BPC.argmax(axis=-1) == label_BP).astype("float32") * shown_BP
            parts[name] = lm_loss(logits_BPC, label_BP)  # patches for positions, classes for tokens: the same masked mean
            parts[f"{name}_accuracy"] = right_BP.sum() / shown_BP.sum().clip(min=1)
            losses.append(parts[name])
        return {"loss": paddle.add_n(losses), **parts}
