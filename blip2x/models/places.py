"""Chosen places of texts, padded to one length, as one row.

B texts, L tokens, N places, D width.
"""

from __future__ import annotations

from paddle import Tensor


def at_places(tensor_BL: Tensor, place_N: Tensor | None) -> Tensor:
    """[N, ...] at `place_N`, places in B * L, of hidden states [B, L, D] or labels [B, L]; None: of all positions, as they are.

    What follows hidden states, the last norm and the head, looks at each position alone, and the head is as wide as the
    vocabulary: there is no use in asking it for what no loss reads.
    """
    return tensor_BL if place_N is None else tensor_BL.flatten(0, 1).index_select(place_N)
