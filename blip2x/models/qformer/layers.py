"""BERT's blocks, with cross-attention and a second feed-forward for the queries (Devlin et al., 2019; BLIP-2, section 3.1).

B rows that ask, N rows that answer, T positions that ask, S positions that answer, Q queries, P patches, D width, H heads,
W width of one head.
"""

from __future__ import annotations

import math

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.models.dropout import dropout
from blip2x.models.linear import Linear

KeysValues = tuple[Tensor, Tensor]  # [N, H, S, W] each

LAYER_NORM_EPS = 1e-12


def weight(width: int) -> paddle.ParamAttr:
    """How matrices of a Q-Former of `width` are drawn: as BERT's, whose 0.02 is for a width of 768.

    A narrower model needs larger numbers for sums of the same size; with 0.02 at a width of 96 it starts as good as blind to
    images, and stage 1 stalls.
    """
    return paddle.ParamAttr(initializer=nn.initializer.Normal(std=0.02 * math.sqrt(768 / width)))


def make_linear(inputs: int, outputs: int, *, width: int) -> Linear:
    """A linear layer of a Q-Former of `width`; its bias starts at 0."""
    zero = paddle.ParamAttr(initializer=nn.initializer.Constant(0.0))
    return Linear(inputs, outputs, weight_attr=weight(width), bias_attr=zero)


class Attention(nn.Layer):
    """Multi-head attention with its output projection, residual connection and norm (BERT normalises after adding)."""

    def __init__(self, *, width: int, num_heads: int, dropout: float, source_width: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.query = make_linear(width, width, width=width)
        self.key = make_linear(source_width or width, width, width=width)
        self.value = make_linear(source_width or width, width, width=width)
        self.out = make_linear(width, width, width=width)
        self.norm = nn.LayerNorm(width, epsilon=LAYER_NORM_EPS)
        self.dropout = dropout

    def keys_values(self, source_NSD: Tensor) -> KeysValues:
        """What `source_NSD` answers with."""
        return self._split(self.key(source_NSD)), self._split(self.value(source_NSD))

    def forward(self, hidden_BTD: Tensor, keys_values: KeysValues, bias: Tensor | None) -> Tensor:
        """`hidden_BTD` plus what it gathers; `bias` is added to the scores [B, H, T, S], None: everything is seen.

        B is a multiple of N: each row of keys is asked by B / N rows, one after the other, in one product, so that no copies of
        keys and values are made for them. There is no `bias` then.
        """
        key_NHSW, value_NHSW = keys_values
        asking_NTD = hidden_BTD
        if key_NHSW.shape[0] < hidden_BTD.shape[0]:
            asking_NTD = hidden_BTD.reshape([key_NHSW.shape[0], -1, hidden_BTD.shape[2]])
        share_NHTS = self.shares(asking_NTD, key_NHSW, bias)
        share_NHTS = dropout(share_NHTS, self.dropout, training=self.training)
        mixed_BTD = paddle.matmul(share_NHTS, value_NHSW).transpose([0, 2, 1, 3]).reshape(hidden_BTD.shape)
        return self.norm(hidden_BTD + dropout(self.out(mixed_BTD), self.dropout, training=self.training))

    def shares(self, hidden_BTD: Tensor, key_BHSW: Tensor, bias: Tensor | None = None) -> Tensor:
        """How each position divides its look among what answers: [B, H, T, S], a sum of 1 over S; `bias` as in `forward`."""
        query_BHTW = self._split(self.query(hidden_BTD))
        score_BHTS = paddle.matmul(query_BHTW * (1 / math.sqrt(query_BHTW.shape[-1])), key_BHSW, transpose_y=True)
        return F.softmax(score_BHTS if bias is None else score_BHTS + bias, axis=-1)

    def _split(self, hidden_BSD: Tensor) -> Tensor:
        rows, length, width = hidden_BSD.shape
        return hidden_BSD.reshape([rows, length, self.num_heads, width // self.num_heads]).transpose([0, 2, 1, 3])


class FeedForward(nn.Layer):
    """Two linear layers with exact GELU between them, residual connection and norm."""

    def __init__(self, *, width: int, mlp_width: int, dropout: float):
        super().__init__()
        self.fc1 = make_linear(width, mlp_width, width=width)
        self.fc2 = make_linear(mlp_width, width, width=width)
        self.norm = nn.LayerNorm(width, epsilon=LAYER_NORM_EPS)
        self.dropout = dropout

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Each position by itself."""
        out_BTD = self.fc2(F.gelu(self.fc1(hidden_BTD)))
        return self.norm(hidden_BTD + dropout(out_BTD, self.dropout, training=self.training))


class QFormerLayer(nn.Layer):
    """Self-attention over queries and text; then queries look at the image; each kind has a feed-forward of its own.

    Args:
        width: of queries and text.
        num_heads: of both attentions.
        mlp_width: of both feed-forwards.
        dropout: after attention weights, attentions and feed-forwards.
        vision_width: width of the patches; None: this layer does not look at the image.
        reads_text: whether there is a feed-forward for text.
    """

    def __init__(
        self, *, width: int, num_heads: int, mlp_width: int, dropout: float, vision_width: int | None, reads_text: bool
    ):
        super().__init__()
        self.attention = Attention(width=width, num_heads=num_heads, dropout=dropout)
        self.cross_attention = None
        if vision_width is not None:
            self.cross_attention = Attention(width=width, num_heads=num_heads, dropout=dropout, source_width=vision_width)
        self.query_ffn = FeedForward(width=width, mlp_width=mlp_width, dropout=dropout)
        self.text_ffn = FeedForward(width=width, mlp_width=mlp_width, dropout=dropout) if reads_text else None

    def forward(
        self,
        hidden_BTD: Tensor,
        *,
        num_queries: int,
        image: Tensor | KeysValues | None = None,
        bias: Tensor | None = None,
        past: KeysValues | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Positions `[queries][text]`, the first `num_queries` of them queries, behind the keys and values in `past`.

        Returns the new hidden states and the self-attention's keys and values, `past` included.

        Args:
            hidden_BTD: the positions.
            num_queries: how many of them are queries.
            image: patches [N, P, D], or the keys and values that the cross-attention made of them; each image is
                looked at by as many rows, one after the other.
            bias: on the self-attention's scores.
            past: keys and values before these positions.
            wanted: only the first so many positions go on: all answer, but no other asks; None: all.
        """
        keys_values = self.attention.keys_values(hidden_BTD)
        if past is not None:
            keys_values = tuple(paddle.concat(pair, axis=2) for pair in zip(past, keys_values, strict=True))
        if wanted is not None:
            hidden_BTD, bias = hidden_BTD[:, :wanted], None if bias is None else bias[:, :, :wanted]
        hidden_BTD = self.attention(hidden_BTD, keys_values, bias)
        parts = []
        if num_queries:
            query_BQD = hidden_BTD[:, :num_queries]
            if self.cross_attention is not None:
                looked_at = self.cross_attention.keys_values(image) if isinstance(image, Tensor) else image
                query_BQD = self.cross_attention(query_BQD, looked_at, None)
            parts.append(self.query_ffn(query_BQD))
        if num_queries < hidden_BTD.shape[1]:
            parts.append(self.text_ffn(hidden_BTD[:, num_queries:]))
        return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=1), keys_values
