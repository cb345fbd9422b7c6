"""OPT as a reader of embeddings, on PaddleNLP's modules (Zhang et al., 2022, arXiv 2205.01068).

B texts, N rows of a decoding batch, L tokens, S tokens so far, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import paddle
from paddle import Tensor, nn
from paddlenlp.transformers.opt.configuration import OPTConfig as PaddleNlpConfig
from paddlenlp.transformers.opt.modeling import MultiHeadAttention, OPTModel

from blip2x.config.model import OptConfig
from blip2x.errors import UserError
from blip2x.models.compact import linear_of_words, type_of
from blip2x.models.language._common import Cache, LayerNorm, build_pretrained, select_rows
from blip2x.models.masks import attention_bias, causal, for_all_heads
from blip2x.models.precision import without_autocast
from blip2x.models.recompute import call
from blip2x.models.tensor_parallel import RowLinear, SplitEmbedding, copy_for_ranks, split_columns
from blip2x.parallel.context import TensorGroup
from blip2x.registry import LANGUAGE_MODELS


class OptState(NamedTuple):
    """Keys and values of the tokens so far, and which of these are no padding."""

    cache: Cache
    mask_NS: Tensor


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
        for layer in self.opt.sublayers():
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.LayerNorm):
                    setattr(layer, name, LayerNorm(width, epsilon=child._epsilon))

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

    def forward(self, embeds_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each position, for texts given as embeddings."""
        hidden_BLD, _ = self._run(embeds_BLD, mask_BL, cache=None, use_cache=False)
        return self._head(hidden_BLD)

    def prefill(self, prefix: tuple[Tensor, Tensor]) -> tuple[Tensor, OptState]:
        """Read ``(embeds_BSD, mask_BS)``, padded on the left: float32 logits [B, V] of the first new token, and the state."""
        embeds_BSD, mask_BS = prefix
        hidden_BSD, cache = self._run(embeds_BSD, mask_BS, cache=None, use_cache=True)
        return self._head(hidden_BSD[:, -1]).astype("float32"), OptState(cache, mask_BS)

    def step(self, token_N: Tensor, state: OptState) -> tuple[Tensor, OptState]:
        """Append one token per row: float32 logits [N, V] of the next one, and the new state."""
        new_N1 = paddle.ones([token_N.shape[0], 1], dtype=state.mask_NS.dtype)
        mask_NS = paddle.concat([state.mask_NS, new_N1], axis=1)
        hidden_N1D, cache = self._run(self.embed(token_N.unsqueeze(1)), mask_NS, cache=state.cache, use_cache=True)
        return self._head(hidden_N1D[:, 0]).astype("float32"), OptState(cache, mask_NS)

    def reorder(self, state: OptState, index_N: Tensor) -> OptState:
        """Keep the rows `index_N`, which may repeat."""
        return OptState(select_rows(state.cache, index_N), paddle.index_select(state.mask_NS, index_N, axis=0))

    def _run(self, embeds_BLD: Tensor, mask_BS: Tensor, *, cache: Cache | None, use_cache: bool) -> tuple[Tensor, Cache | None]:
        """Hidden states of L new tokens behind a cache of S - L tokens, and the new cache where asked for."""
        length, total = embeds_BLD.shape[1], mask_BS.shape[1]
        if total > self.max_positions:
            raise UserError(f"a text of {total} tokens, queries included, is longer than OPT's {self.max_positions} positions")
        visible_B11S = mask_BS.astype("bool").unsqueeze([1, 2])
        visible = visible_B11S if length == 1 else visible_B11S & causal(total)[:, :, total - length :]
        embeds_BLD = embeds_BLD.astype(type_of(self.opt.embeddings.word_embeddings.weight))  # the queries' may be another
        bias = for_all_heads(attention_bias(visible, embeds_BLD.dtype), self.num_heads, length)
        past = None if cache is None else [MultiHeadAttention.Cache(*block) for block in cache]
        with without_autocast():
            position_BLD = self.opt.embeddings.position_embeddings(mask_BS.astype("int64"), total - length)
        hidden_BLD = self.opt.embeddings.dropout(embeds_BLD + position_BLD)
        if use_cache:
            return self.opt.decoder(hidden_BLD, memory=None, tgt_mask=bias, use_cache=True, cache=past)
        for layer in self.opt.decoder.layers:
            hidden_BLD = call(layer, hidden_BLD, again=self.recompute, memory=None, tgt_mask=bias)
        return self.opt.decoder.final_layer_norm(hidden_BLD), None

    def _head(self, hidden: Tensor) -> Tensor:
        words = self.opt.embeddings.word_embeddings
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
