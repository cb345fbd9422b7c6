"""What a model must offer to generate text: three methods, and a state that only the model looks into.

B prefixes, N rows of the decoding batch (B x beams), V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from paddle import Tensor


class Decoder(Protocol):
    """Reads a prefix once, then one token per row and step.

    A state goes on once, by `step` or by `reorder`: what follows may be written into its memory.
    """

    def prefill(self, prefix: Any) -> tuple[Tensor, Any]:
        """Float32 logits [B, V] of the first new token, and the state after the prefix."""

    def step(self, token_N: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Append token_N (int64 [N]): float32 logits [N, V] of the next token, and the new state."""

    def reorder(self, state: Any, index_N: np.ndarray) -> Any:
        """Row n of the new state is row index_N[n] of the old one; rows may repeat (beams start) or vanish (text is done)."""
