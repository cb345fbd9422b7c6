"""The Q-Former: learned queries that read an image through BERT, alone, beside a text, or before one.

B rows, I images, Q queries, P patches, L text tokens, T = Q + L, S positions seen, D width, N places, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from blip2x.config.model import QFormerConfig
from blip2x.errors import UserError
from blip2x.models.dropout import dropout
from blip2x.models.linear import add_bias
from blip2x.models.masks import attention_bias, causal, for_all_heads
from blip2x.models.places import at_places
from blip2x.models.qformer.layers import LAYER_NORM_EPS, KeysValues, QFormerLayer, make_linear, weight
from blip2x.models.recompute import call

Cache = list[KeysValues]  # of each layer's self-attention
ImageCache = list[KeysValues | None]  # of each layer's cross-attention, None: it has none


class TextParts(nn.Layer):
    """What only texts need: embeddings, and where texts are written a head, tied to the word embeddings."""

    def __init__(self, *, width: int, vocab_size: int, max_positions: int, writes: bool):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, weight_attr=weight(width))
        self.position_embeddings = nn.Embedding(max_positions, width, weight_attr=weight(width))
        if writes:
            self.head_transform = make_linear(width, width, width=width)
            self.head_norm = nn.LayerNorm(width, epsilon=LAYER_NORM_EPS)
            self.head_bias = self.create_parameter([vocab_size], is_bias=True)

    def embed(self, ids_BL: Tensor, *, first: int = 0) -> Tensor:
        """Word and position embeddings [B, L, D], the first token at position `first`."""
        length, longest = ids_BL.shape[1], self.position_embeddings.weight.shape[0]
        if first + length > longest:
            raise UserError(
                f"a text of {first + length} tokens is longer than the Q-Former's {longest} positions; lower task.max_txt_len, "
                "or task.max_new_tokens where captions are written"
            )
        return self.word_embeddings(ids_BL) + self.position_embeddings(paddle.arange(first, first + length))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., V] of the next token."""
        hidden = self.head_norm(F.gelu(self.head_transform(hidden)))
        return add_bias(paddle.matmul(hidden, self.word_embeddings.weight, transpose_y=True), self.head_bias)


class QFormer(nn.Layer):
    """BERT with learned queries; every `cross_attention_every`-th layer, from the first on, lets them look at the image.

    Args:
        num_queries: learned queries.
        width: of queries and texts.
        depth: layers.
        num_heads: per attention.
        mlp_width: of the feed-forwards.
        cross_attention_every: 2 in the paper.
        vision_width: width of the patches.
        dropout: acts in training.
        vocab_size: of the texts, [DEC] included; None: no texts (stage 2), so no embeddings, no text feed-forward, no head.
        max_positions: longest text.
        recompute: compute the layers' insides again in the backward pass, to save memory.
        writes: with the head that captions need; without, texts are only read.

    Raises:
        UserError: heads that do not divide the width.
    """

    def __init__(
        self,
        *,
        num_queries: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        cross_attention_every: int,
        vision_width: int,
        dropout: float,
        vocab_size: int | None,
        max_positions: int,
        recompute: bool = False,
        writes: bool = True,
    ):
        super().__init__()
        if width % num_heads:
            raise UserError(f"width {width} of the Q-Former is no multiple of its num_heads {num_heads}")
        self.num_queries, self.width = num_queries, width
        self.query_tokens = self.create_parameter([1, num_queries, width], attr=weight(width))
        self.embeddings_norm = nn.LayerNorm(width, epsilon=LAYER_NORM_EPS)
        self.dropout = dropout
        self.recompute = recompute
        self.text = None
        if vocab_size is not None:
            self.text = TextParts(width=width, vocab_size=vocab_size, max_positions=max_positions, writes=writes)
        self.layers = nn.LayerList(
            [
                QFormerLayer(
                    width=width,
                    num_heads=num_heads,
                    mlp_width=mlp_width,
                    dropout=dropout,
                    vision_width=vision_width if index % cross_attention_every == 0 else None,
                    reads_text=vocab_size is not None,
                )
                for index in range(depth)
            ]
        )

    def look(self, patch_IPD: Tensor) -> ImageCache:
        """The keys and values that the layers make of patches, for passes that look at the same images several times.

        They are most of a pass's arithmetic: at full size 257 patches of 1408 numbers are read by 32 queries. Each pass takes
        patches as well and then makes keys and values itself, layer by layer.
        """
        attentions = (layer.cross_attention for layer in self.layers)
        return [None if attention is None else attention.keys_values(patch_IPD) for attention in attentions]

    def encode_image(self, image: Tensor | ImageCache) -> tuple[Tensor, Cache]:
        """The queries' output [I, Q, D], and their keys and values, which captions attend to; `image`: [I, P, D], or `look`."""
        return self._run(self._normalise(self._queries(_rows(image))), num_queries=self.num_queries, image=image)

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The output [B, D] of the first token, [CLS]; tokens see each other and no image (unimodal mask)."""
        bias = attention_bias(mask_BL.astype("bool").unsqueeze([1, 2]), self.query_tokens.dtype)
        hidden_B1D, _ = self._run(self._normalise(self.text.embed(ids_BL)), num_queries=0, bias=bias, wanted=1)
        return hidden_B1D[:, 0]

    def encode_pair(self, image: Tensor | ImageCache, ids_BL: Tensor, mask_BL: Tensor, *, reaches_all: bool = False) -> Tensor:
        """The queries' output [B, Q, D] where queries and text see each other (bidirectional mask).

        `image`, patches [I, P, D] or what `look` made of them, may have fewer rows than there are texts: then each image is
        paired with as many texts, one image's after the other's, e.g. a single image with all texts.

        Nobody reads the text behind the last layer, so its part is not computed there. With `reaches_all` it is, so that the
        layer's text feed-forward gets a gradient, of zeros: where it is trained by no other pass, data parallelism would wait
        for it.
        """
        embeds_BTD = paddle.concat([self._queries(ids_BL.shape[0]), self.text.embed(ids_BL)], axis=1)
        query_mask_BQ = paddle.ones([mask_BL.shape[0], self.num_queries], dtype=mask_BL.dtype)
        visible_B11T = paddle.concat([query_mask_BQ, mask_BL], axis=1).astype("bool").unsqueeze([1, 2])
        bias = attention_bias(visible_B11T, embeds_BTD.dtype)
        queries = self.num_queries
        wanted = None if reaches_all else queries
        hidden_BTD, _ = self._run(self._normalise(embeds_BTD), num_queries=queries, image=image, bias=bias, wanted=wanted)
        return hidden_BTD[:, :queries] if reaches_all else hidden_BTD

    def caption_logits(self, ids_BL: Tensor, mask_BL: Tensor, cache: Cache, place_N: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of the token after each; tokens see the queries in `cache` and the tokens before them.

        The queries never saw the text (multimodal causal mask), so their pass serves the other losses as well.

        With `place_N`, places in B * L, there are logits [N, V] of these alone: the head is as wide as the vocabulary, and
        nobody asks what follows padding.
        """
        length, queries = ids_BL.shape[1], cache[0][0].shape[2]
        query_mask_BQ = paddle.ones([mask_BL.shape[0], queries], dtype=mask_BL.dtype)
        visible_B11T = paddle.concat([query_mask_BQ, mask_BL], axis=1).astype("bool").unsqueeze([1, 2])
        bias = attention_bias(visible_B11T & causal(queries + length)[:, :, queries:], self.query_tokens.dtype)
        hidden_BLD, _ = self._run(self._normalise(self.text.embed(ids_BL)), num_queries=0, bias=bias, past=cache)
        return self.text.logits(at_places(hidden_BLD, place_N))

    def _queries(self, rows: int) -> Tensor:
        return self.query_tokens.expand([rows, -1, -1])

    def _normalise(self, embeds_BTD: Tensor) -> Tensor:
        return dropout(self.embeddings_norm(embeds_BTD), self.dropout, training=self.training)

    def _run(
        self,
        hidden_BTD: Tensor,
        *,
        num_queries: int,
        image: Tensor | ImageCache | None = None,
        bias: Tensor | None = None,
        past: Cache | None = None,
        wanted: int | None = None,
    ) -> tuple[Tensor, Cache]:
        """`wanted`: the output is needed of the first so many positions alone; None: of all."""
        cache = []
        if bias is not None:
            bias = for_all_heads(bias, self.layers[0].attention.num_heads, hidden_BTD.shape[1])
        for index, layer in enumerate(self.layers):
            hidden_BTD, keys_values = call(
                layer,
                hidden_BTD,
                again=self.recompute,
                num_queries=num_queries,
                image=image[index] if isinstance(image, list) else image,
                bias=bias,
                past=None if past is None else past[index],
                wanted=wanted if index == len(self.layers) - 1 else None,
            )
            cache.append(keys_values)
        return hidden_BTD, cache


def rows_of(image: Tensor | ImageCache | Cache, index_N: Tensor) -> Any:
    """The rows `index_N`, which may repeat, of patches, of what `QFormer.look` made of them, or of what captions attend to."""
    if isinstance(image, Tensor):
        return image.index_select(index_N)
    return [pair and tuple(tensor.index_select(index_N) for tensor in pair) for pair in image]


def _rows(image: Tensor | ImageCache) -> int:
    """How many images there are; the first layer looks at them."""
    return image[0][0].shape[0] if isinstance(image, list) else image.shape[0]


def build_qformer(cfg: QFormerConfig, *, vision_width: int, vocab_size: int | None, writes: bool = True) -> QFormer:
    """The Q-Former of `cfg` with random weights; `vocab_size` None: without what only texts need; `writes` as there."""
    return QFormer(
        num_queries=cfg.num_queries,
        width=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_width=cfg.mlp_width,
        cross_attention_every=cfg.cross_attention_every,
        vision_width=vision_width,
        dropout=cfg.dropout,
        vocab_size=vocab_size,
        max_positions=cfg.max_positions,
        recompute=cfg.recompute,
        writes=writes,
    )
