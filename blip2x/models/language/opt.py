"""OPT as a reader of embeddings, on PaddleNLP's modules (Zhang et al., 2022, arXiv 2205.01068).

B texts, I images, Q queries, N rows of a decoding batch, L tokens, S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddlenlp.transformers.opt.configuration import OPTConfig as PaddleNlpConfig
from paddlenlp.transformers.opt.modeling import MultiHeadAttention, OPTModel, TransformerDecoderLayer

from blip2x.config.model import OptConfig
from blip2x.errors import UserError
from blip2x.models.cached_attention import KeysValues, SharedCache
from blip2x.models.compact import linear_of_words, type_of
from blip2x.models.language._common import LayerNorm, build_pretrained, replace_norms
from blip2x.models.linear import use_linear
from blip2x.models.masks import attention_bias, causal, for_all_heads
from blip2x.models.places import at_places
from blip2x.models.precision import without_autocast
from blip2x.models.prefix import Prefix, SharedPrefix, SharedQueries, written_out
from blip2x.models.recompute import call
from blip2x.models.tensor_parallel import RowLinear, SplitEmbedding, copy_for_ranks, split_columns
from blip2x.parallel.context import TensorGroup
from blip2x.registry import LANGUAGE_MODELS


class OptLanguageModel(nn.Layer):
    """A decoder-only language model, pre-norm, with learned positions; its head is the word embedding.

    Masks are 1 on tokens and 0 on padding, which may stand anywhere: positions count tokens only. With `recompute` the layers'
    insides are computed again in the backward pass, to save memory.
    """

    is_encoder_decoder = False
    start_id = None  # new tokens follow the prefix directly

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        mlp_width: int,
        vocab_size: int,
        max_positions: int,
        dropout: float,
        recompute: bool = False,
    ):
        super().__init__()
        self.width, self.depth, self.num_heads = width, depth, num_heads
        self.vocab_size, self.max_positions, self.recompute = vocab_size, max_positions, recompute
        config = PaddleNlpConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            word_embed_proj_dim=width,
            num_hidden_layers=depth,
            num_attention_heads=num_heads,
            intermediate_size=mlp_width,
            max_position_embeddings=max_positions,
            initializer_range=0.02 * math.sqrt(768 / width),  # a tiny model with 0.02 starts as good as without attention
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,  # as the published models; PaddleNLP's default is 0.1
        )
        # The bare model: OPTForCausalLM has a second, untied head matrix. Its embeddings and decoder are called one by one,
        # since its own masks are made in the default type and overflow in half precision.
        self.opt = build_pretrained(lambda: OPTModel(config))
        replace_norms(self.opt, nn.LayerNorm, lambda norm: LayerNorm(width, epsilon=norm._epsilon))
        use_linear(self.opt)

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of heads, hidden units and words; before the model has memory (`tensor_parallel`)."""
        self.num_heads //= group.size
        self.opt.embeddings.word_embeddings = SplitEmbedding(self.opt.embeddings.word_embeddings, group)
        copy_for_ranks(self.opt.decoder.final_layer_norm, group)
        for layer in self.opt.decoder.layers:
            attention = layer.self_attn
            attention.num_heads //= group.size
            copy_for_ranks(layer.norm1, group)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                split_columns(linear, group)
            attention.out_proj = RowLinear(attention.out_proj, group)
            copy_for_ranks(layer.norm2, group)
            split_columns(layer.linear1, group)
            layer.linear2 = RowLinear(layer.linear2, group)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Token embeddings [B, L, D], without positions."""
        with without_autocast():
            return self.opt.embeddings.word_embeddings(ids_BL)

    def forward(self, embeds_BLD: Tensor, mask_BL: Tensor, place_N: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of the token after each position, for texts given as embeddings; see `at_places`."""
        return self._head(at_places(self._run(embeds_BLD, mask_BL), place_N))

    @paddle.no_grad()
    def share(self, query_IQD: Tensor) -> SharedQueries:
        """Read images' queries once for all the texts behind them, which they do not see."""
        self._check_length(query_IQD.shape[1])
        mask_IQ = paddle.ones(query_IQD.shape[:2], "int64")
        return SharedQueries(query_IQD, self._read(query_IQD, mask_IQ)[1])

    @paddle.no_grad()
    def prefill(self, prefix: Prefix | SharedPrefix) -> tuple[Tensor, SharedCache]:
        """Read the prefixes, padded on the left: float32 logits [B, V] of the first new token, and the state."""
        past = row_B = None
        if isinstance(prefix, SharedPrefix) and prefix.queries.read is not None:
            (query_IQD, past), image_B, embeds_BLD, mask_BL = prefix
            query_mask_BQ = paddle.ones([len(image_B), query_IQD.shape[1]], mask_BL.dtype)
            mask_BS, row_B = paddle.concat([query_mask_BQ, mask_BL], axis=1), paddle.to_tensor(image_B)
        else:
            embeds_BLD, mask_BS = written_out(prefix)
        visible_BS = mask_BS.numpy().astype(bool)
        self._check_length(visible_BS.sum(axis=1).max())
        hidden_BLD, pairs = self._read(embeds_BLD, mask_BS, past=past, row_B=row_B)
        cache = SharedCache(pairs, visible_BS, heads=self.num_heads)
        look, hidden_BD = cache.open(), hidden_BLD[:, -1]
        layer = self.opt.decoder.layers[-1]
        query_BD = self._query(layer, layer.norm1(hidden_BD))
        hidden_BD = self._behind(layer, hidden_BD, look.read(self.depth - 1, query_BD, look.bias(self._stored_as)))
        return self._head(hidden_BD).astype("float32"), cache

    @paddle.no_grad()
    def step(self, token_N: Tensor, state: SharedCache) -> tuple[Tensor, SharedCache]:
        """Append one token per row: float32 logits [N, V] of the next one, and the new state."""
        look, positions = state.append(), self.opt.embeddings.position_embeddings
        self._check_length(state.seen_N.max())
        position_N = paddle.to_tensor(state.seen_N - 1 + positions.offset)
        with without_autocast():
            position_ND = F.embedding(position_N, positions.weight)
        hidden_ND = self.embed(token_N) + position_ND
        bias = look.bias(self._stored_as)
        for place, layer in enumerate(self.opt.decoder.layers):
            normed_ND, attention = layer.norm1(hidden_ND), layer.self_attn
            look.write(place, attention.k_proj(normed_ND), attention.v_proj(normed_ND))
            hidden_ND = self._behind(layer, hidden_ND, look.read(place, self._query(layer, normed_ND), bias))
        return self._head(hidden_ND).astype("float32"), state

    def reorder(self, state: SharedCache, index_N: np.ndarray) -> SharedCache:
        """Keep the rows `index_N`, which may repeat."""
        return state.reorder(index_N)

    def _run(self, embeds_BLD: Tensor, mask_BS: Tensor) -> Tensor:
        """Hidden states of whole texts, before the last norm."""
        self._check_length(mask_BS.shape[1])  # padding counts, for which nobody waits for the device
        hidden_BLD, bias = self._enter(embeds_BLD, mask_BS)
        for layer in self.opt.decoder.layers:
            hidden_BLD = call(layer, hidden_BLD, again=self.recompute, memory=None, tgt_mask=bias)
        return hidden_BLD

    def _read(
        self, embeds_BLD: Tensor, mask_BS: Tensor, *, past: list[KeysValues] | None = None, row_B: Tensor | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Hidden states before the last layer, of whose output one position will do, and all layers' keys and values.

        `past` holds those of what stands before the L tokens, in which text b goes on from row `row_B[b]`.
        """
        hidden_BLD, bias = self._enter(embeds_BLD, mask_BS)
        *layers, last = self.opt.decoder.layers
        pairs = []
        for place, layer in enumerate(layers):
            before = None
            if past is not None:
                before = MultiHeadAttention.Cache(*(paddle.index_select(tensor, row_B, axis=0) for tensor in past[place]))
            hidden_BLD, pair = layer(hidden_BLD, None, tgt_mask=bias, use_cache=True, cache=before)
            pairs.append(tuple(pair))
        normed_BLD = last.norm1(hidden_BLD)
        pair = last.self_attn.compute_kv(normed_BLD, normed_BLD)
        if past is not None:
            before = (paddle.index_select(tensor, row_B, axis=0) for tensor in past[-1])
            pair = tuple(paddle.concat([old, new], axis=2) for old, new in zip(before, pair, strict=True))
        return hidden_BLD, [*pairs, pair]

    def _enter(self, embeds_BLD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Where the layers start from at the last L of S positions, and the bias of their attention."""
        length, total = embeds_BLD.shape[1], mask_BS.shape[1]
        visible = mask_BS.astype("bool").unsqueeze([1, 2]) & causal(total)[:, :, total - length :]
        embeds_BLD = embeds_BLD.astype(self._stored_as)  # the queries' may be another
        bias = for_all_heads(attention_bias(visible, self._stored_as), self.num_heads, length)
        with without_autocast():
            position_BLD = self.opt.embeddings.position_embeddings(mask_BS.astype("int64"), total - length)
        return self.opt.embeddings.dropout(embeds_BLD + position_BLD), bias

    def _query(self, layer: TransformerDecoderLayer, normed_ND: Tensor) -> Tensor:
        return layer.self_attn.q_proj(normed_ND) * layer.self_attn.head_dim**-0.5

    def _behind(self, layer: TransformerDecoderLayer, hidden_ND: Tensor, mixed_ND: Tensor) -> Tensor:
        """The rest of a layer, behind what its attention gathered."""
        hidden_ND = hidden_ND + layer.self_attn.out_proj(mixed_ND)
        return hidden_ND + layer.linear2(layer.activation(layer.linear1(layer.norm2(hidden_ND))))

    def _check_length(self, total: int) -> None:
        if total > self.max_positions:
            raise UserError(f"a text of {total} tokens, queries included, is longer than OPT's {self.max_positions} positions")

    @property
    def _stored_as(self) -> paddle.dtype:
        return type_of(self.opt.embeddings.word_embeddings.weight)

    def _head(self, hidden: Tensor) -> Tensor:
        """The last norm, and the logits."""
        hidden, words = self.opt.decoder.final_layer_norm(hidden), self.opt.embeddings.word_embeddings
        if isinstance(words, SplitEmbedding):
            return words.logits(hidden)
        return linear_of_words(hidden, words.weight)


@LANGUAGE_MODELS.register("opt")
def build(cfg: OptConfig, vocab_size: int) -> OptLanguageModel:
    """Build the OPT of `cfg` with random weights; `vocab_size` is the tokenizer's, used where the config leaves it open."""
    return OptLanguageModel(
        width=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.num_heads,
        mlp_width=cfg.mlp_width,
        vocab_size=cfg.vocab_size or vocab_size,
        max_positions=cfg.max_positions,
        dropout=cfg.dropout,
        recompute=cfg.recompute,
    )
