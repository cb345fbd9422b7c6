"""What a language model reads before it writes: an image's queries, and a text behind them.

B texts, I images, Q queries, L tokens, S = Q + L, D width of the language model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import paddle
from paddle import Tensor

Prefix = tuple[Tensor, Tensor]  # embeddings [B, S, D], and which of them are there [B, S]


class SharedQueries(NamedTuple):
    """Images' queries that serve several texts; a language model's `share` makes them."""

    query_IQD: Tensor
    read: Any  # what the language model made of them ahead of any text; None: nothing, they are read with each


class SharedPrefix(NamedTuple):
    """Texts of which several may be about one image."""

    queries: SharedQueries
    image_B: np.ndarray  # int64, each text's row of the queries
    text_BLD: Tensor
    mask_BL: Tensor  # 1 on tokens, 0 on padding


def written_out(prefix: Prefix | SharedPrefix) -> Prefix:
    """The same with an image's queries written out for each text about it."""
    if not isinstance(prefix, SharedPrefix):
        return prefix
    query_BQD = paddle.index_select(prefix.queries.query_IQD, paddle.to_tensor(prefix.image_B), axis=0)
    return join(query_BQD, prefix.text_BLD, prefix.mask_BL)


def join(query_BQD: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Prefix:
    """Queries and then the text; queries have no padding."""
    query_mask_BQ = paddle.ones(query_BQD.shape[:2], dtype=mask_BL.dtype)
    text_BLD = text_BLD.astype(query_BQD.dtype)
    return paddle.concat([query_BQD, text_BLD], axis=1), paddle.concat([query_mask_BQ, mask_BL], axis=1)
