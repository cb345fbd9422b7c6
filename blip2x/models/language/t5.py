"""T5 1.1 / FlanT5 as a reader of embeddings, on PaddleNLP's modules (Raffel et al., 2020, arXiv 1910.10683).

B texts, N rows of a decoding batch, S encoder positions, T decoder tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import paddle
from paddle import Tensor, nn
from paddlenlp.transformers.t5.configuration import T5Config as PaddleNlpConfig
from paddlenlp.transformers.t5.modeling import T5Attention, T5DenseGatedGeluDense, T5LayerNorm, T5Stack

from blip2x.config.model import Activation, T5Config
from blip2x.models.cached_attention import KeysValues, Look, SharedCache
from blip2x.models.compact import type_of
from blip2x.models.language._common import build_pretrained, replace_norms
from blip2x.models.masks import attention_bias, causal, for_all_heads
from blip2x.models.places import at_places
from blip2x.models.precision import never_float16, without_autocast
from blip2x.models.prefix import Prefix, SharedPrefix, SharedQueries, written_out
from blip2x.models.recompute import call
from blip2x.models.tensor_parallel import RowLinear, SplitEmbedding, SplitHead, copy_for_ranks, keep_share, split_columns
from blip2x.parallel.context import TensorGroup
from blip2x.registry import LANGUAGE_MODELS


class T5State(NamedTuple):
    """Keys and values of the decoder's own tokens, and of the encoder's output."""

    own: SharedCache
    memory: SharedCache


class RmsNorm(nn.Layer):
    """Scale to a root mean square of 1, times a weight.

    In place of PaddleNLP's, whose ``pow`` takes a quarter of the decoding time on a CPU, and which makes float16 of bfloat16.
    """

    def __init__(self, width: int, epsilon: float = 1e-6):
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last axis, in float32."""
        exact = hidden.astype("float32")
        scale = paddle.rsqrt((exact * exact).mean(axis=-1, keepdim=True) + self.epsilon)
        return (exact * scale).astype(hidden.dtype) * self.weight.astype(hidden.dtype)  # which is stored in float32


class T5LanguageModel(nn.Layer):
    """An encoder-decoder language model with gated GELU, relative positions and a head of its own.

    The encoder reads embeddings, the decoder token ids that begin with `start_id`. Masks are 1 on tokens and 0 on padding.
    With `recompute` the blocks' insides are computed again in the backward pass, to save memory.
    """

    is_encoder_decoder = True
    start_id = 0  # the padding token

    def __init__(
        self,
        *,
        width: int,
        encoder_depth: int,
        decoder_depth: int,
        num_heads: int,
        head_width: int,
        mlp_width: int,
        vocab_size: int,
        relative_buckets: int,
        relative_max_distance: int,
        exact_gelu: bool,
        dropout: float,
        recompute: bool = False,
    ):
        super().__init__()
        self.width, self.num_heads, self.vocab_size = width, num_heads, vocab_size
        self.relative_buckets, self.relative_max_distance = relative_buckets, relative_max_distance
        self.recompute = recompute
        encoder = PaddleNlpConfig(
            vocab_size=vocab_size,
            d_model=width,
            d_kv=head_width,
            d_ff=mlp_width,
            num_layers=encoder_depth,
            num_heads=num_heads,
            relative_attention_num_buckets=relative_buckets,
            dropout_rate=dropout,
            feed_forward_proj="gated-gelu",
            bos_token_id=self.start_id,
        )
        decoder = copy.deepcopy(encoder)
        decoder.is_decoder, decoder.num_layers = True, decoder_depth
        # The stacks hold the blocks, which are called one by one: T5Stack.forward ignores the configured maximum distance,
        # and works out the biases of all positions again for each new token.
        self.encoder = build_pretrained(lambda: T5Stack(encoder))
        self.decoder = build_pretrained(lambda: T5Stack(decoder))
        for layer in self.sublayers():
            if isinstance(layer, T5DenseGatedGeluDense):
                layer.gelu_act = nn.GELU(approximate=not exact_gelu)  # PaddleNLP knows the approximation only
        replace_norms(self, T5LayerNorm, lambda _: RmsNorm(width))
        self.shared = nn.Embedding(vocab_size, width, weight_attr=nn.initializer.Normal(std=1.0))
        self.lm_head = nn.Linear(width, vocab_size, weight_attr=nn.initializer.Normal(std=width**-0.5), bias_attr=False)

    def split_over(self, group: TensorGroup) -> None:
        """Keep this rank's share of heads, hidden units and words; before the model has memory (`tensor_parallel`)."""
        self.num_heads //= group.size
        self.shared, self.lm_head = SplitEmbedding(self.shared, group), SplitHead(self.lm_head, group)
        for stack in (self.encoder, self.decoder):
            # the encoder's is read by the keys and values of all the decoder's blocks, the decoder's by the head
            copy_for_ranks(stack.final_layer_norm, group)
            for block in stack.block:
                for part in block.layer:
                    copy_for_ranks(part.layer_norm, group)
        for layer in self.sublayers():
            if isinstance(layer, T5Attention):
                layer.n_heads //= group.size
                layer.inner_dim //= group.size
                for linear in (layer.q, layer.k, layer.v):
                    split_columns(linear, group)
                layer.o = RowLinear(layer.o, group)
                if layer.has_relative_attention_bias:
                    keep_share(layer.relative_attention_bias, "weight", 1, group)
            elif isinstance(layer, T5DenseGatedGeluDense):
                split_columns(layer.wi_0, group)
                split_columns(layer.wi_1, group)
                layer.wo = RowLinear(layer.wo, group)

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Token embeddings [B, L, D]."""
        with without_autocast():
            return self.shared(ids_BL)

    @never_float16()
    def forward(
        self,
        embeds_BSD: Tensor,
        mask_BS: Tensor,
        decoder_ids_BT: Tensor,
        decoder_mask_BT: Tensor,
        place_N: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of the token after each decoder position, given the encoder's input as embeddings.

        With `place_N`, places in B * T, of these alone; see `at_places`.
        """
        memory_BSD = self._encode(embeds_BSD, mask_BS)
        length = decoder_ids_BT.shape[1]
        visible_B1TT = decoder_mask_BT.astype("bool").unsqueeze([1, 2]) & causal(length)
        bias_BHTT = self._position_bias(self.decoder, length, length) + attention_bias(visible_B1TT, memory_BSD.dtype)
        hidden = at_places(self._decode(decoder_ids_BT, bias_BHTT, mask_BS, memory_BSD), place_N)
        return self.lm_head(self.decoder.dropout(self.decoder.final_layer_norm(hidden)))

    def share(self, query_IQD: Tensor) -> SharedQueries:
        """Images' queries for several texts each; the encoder reads them with each, since they see the text, too."""
        return SharedQueries(query_IQD, None)

    @never_float16()
    @paddle.no_grad()
    def prefill(self, prefix: Prefix | SharedPrefix) -> tuple[Tensor, T5State]:
        """Encode the prefixes: float32 logits [B, V] of the token after the start token, and the state."""
        embeds_BSD, mask_BS = written_out(prefix)
        memory_BSD = self._encode(embeds_BSD, mask_BS)
        rows = mask_BS.shape[0]
        pairs = [self._memory_keys(block.layer[1].EncDecAttention, memory_BSD) for block in self.decoder.block]
        memory = SharedCache(pairs, mask_BS.numpy().astype(bool), heads=self.num_heads)
        own = SharedCache([None] * len(pairs), np.zeros((rows, 0), bool), heads=self.num_heads)
        start_B = paddle.full([rows], self.start_id, dtype="int64")
        return self._write(start_B, T5State(own, memory), own.append(ahead=False))

    @never_float16()
    @paddle.no_grad()
    def step(self, token_N: Tensor, state: T5State) -> tuple[Tensor, T5State]:
        """Append one token per row: float32 logits [N, V] of the next one, and the new state."""
        return self._write(token_N, state, state.own.append())

    def reorder(self, state: T5State, index_N: np.ndarray) -> T5State:
        """Keep the rows `index_N`, which may repeat."""
        return T5State(*(cache.reorder(index_N) for cache in state))

    def _write(self, token_N: Tensor, state: T5State, look: Look) -> tuple[Tensor, T5State]:
        hidden_ND, memory = self.embed(token_N), state.memory.open()
        dtype = hidden_ND.dtype
        distance_1HT = self._position_bias(self.decoder, 1, state.own.written).squeeze(2)
        distance_GHC = paddle.index_select(distance_1HT, paddle.to_tensor(look.token_GC.reshape(-1)), axis=2)
        distance_GHC = distance_GHC.reshape([self.num_heads, *look.token_GC.shape]).transpose([1, 0, 2])
        bias, memory_bias = look.bias(dtype, distance_GHC.unsqueeze(2)), memory.bias(dtype)
        for place, block in enumerate(self.decoder.block):
            to_own, to_memory, feed_forward = block.layer
            attention, normed_ND = to_own.SelfAttention, to_own.layer_norm(hidden_ND)
            look.write(place, attention.k(normed_ND), attention.v(normed_ND))
            hidden_ND = hidden_ND + attention.o(look.read(place, attention.q(normed_ND), bias))
            attention, normed_ND = to_memory.EncDecAttention, to_memory.layer_norm(hidden_ND)
            hidden_ND = hidden_ND + attention.o(memory.read(place, attention.q(normed_ND), memory_bias))
            hidden_ND = feed_forward(hidden_ND)
        return self.lm_head(self.decoder.final_layer_norm(hidden_ND)).astype("float32"), state

    def _memory_keys(self, attention: T5Attention, memory_BSD: Tensor) -> KeysValues:
        rows, length, _ = memory_BSD.shape
        shape = [rows, length, self.num_heads, attention.key_value_proj_dim]
        return tuple(linear(memory_BSD).reshape(shape).transpose([0, 2, 1, 3]) for linear in (attention.k, attention.v))

    def _encode(self, embeds_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        length = embeds_BSD.shape[1]
        embeds_BSD = embeds_BSD.astype(type_of(self.shared.weight))  # the queries' may be another
        visible_B11S = mask_BS.astype("bool").unsqueeze([1, 2])
        bias_BHSS = self._position_bias(self.encoder, length, length) + attention_bias(visible_B11S, embeds_BSD.dtype)
        hidden_BSD = self.encoder.dropout(embeds_BSD)
        for block in self.encoder.block:
            hidden_BSD = call(block, hidden_BSD, again=self.recompute, position_bias=bias_BHSS)[0]
        return self.encoder.dropout(self.encoder.final_layer_norm(hidden_BSD))

    def _decode(self, ids_BT: Tensor, bias: Tensor, memory_mask_BS: Tensor, memory_BSD: Tensor) -> Tensor:
        """Hidden states of the tokens, before the last norm."""
        hidden_BTD = self.decoder.dropout(self.embed(ids_BT))
        memory_bias = attention_bias(memory_mask_BS.astype("bool").unsqueeze([1, 2]), hidden_BTD.dtype)
        memory_bias = for_all_heads(memory_bias, self.num_heads, ids_BT.shape[1])
        for block in self.decoder.block:
            hidden_BTD = call(
                block,
                hidden_BTD,
                again=self.recompute,
                position_bias=bias,
                encoder_hidden_states=memory_BSD,
                encoder_decoder_position_bias=memory_bias,
            )[0]
        return hidden_BTD

    def _position_bias(self, stack: T5Stack, queries: int, keys: int) -> Tensor:
        """Learned bias [1, H, queries, keys] of each distance; the queries are the last of the keys' positions."""
        attention = stack.block[0].layer[0].SelfAttention  # the first block's serves all
        distance = paddle.arange(keys).unsqueeze(0) - paddle.arange(keys - queries, keys).unsqueeze(1)
        bucket = attention._relative_position_bucket(
            distance,
            bidirectional=not stack.is_decoder,
            num_buckets=self.relative_buckets,
            max_distance=self.relative_max_distance,
        )
        with without_autocast():
            bias = attention.relative_attention_bias(bucket)
        return bias.transpose([2, 0, 1]).unsqueeze(0)


@LANGUAGE_MODELS.register("t5")
def build(cfg: T5Config, vocab_size: int) -> T5LanguageModel:
    """Build the T5 of `cfg` with random weights; `vocab_size` is the tokenizer's, used where the config leaves it open."""
    return T5LanguageModel(
        width=cfg.width,
        encoder_depth=cfg.encoder_depth,
        decoder_depth=cfg.decoder_depth,
        num_heads=cfg.num_heads,
        head_width=cfg.head_width,
        mlp_width=cfg.mlp_width,
        vocab_size=cfg.vocab_size or vocab_size,
        relative_buckets=cfg.relative_buckets,
        relative_max_distance=cfg.relative_max_distance,
        exact_gelu=cfg.activation is not Activation.gelu_tanh,  # null: as LAVIS computes
        dropout=cfg.dropout,
        recompute=cfg.recompute,
    )
