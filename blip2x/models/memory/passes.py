"""The models' forward passes with ghosts: the same steps in the same order as the layers of the same names, without numbers.

B rows, T positions that ask, S positions that answer, Q queries, L text tokens, P patches, D width, H heads,
N places to predict, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from blip2x.config.model import OptConfig, QFormerConfig, T5Config, VisionConfig
from blip2x.models.memory.ghosts import Ghost, Tracer, call

KeysValues = tuple[Ghost, Ghost]
ImageCache = list[KeysValues | None]


@dataclass(frozen=True)
class VisionPass:
    """blip2x.models.vision: images to patches. `ranks` share its matrices; the sum over its blocks is in the full type."""

    t: Tracer
    cfg: VisionConfig
    ranks: int = 1

    def __call__(self, image: Ghost) -> Ghost:
        """[B, P, D]."""
        t, cfg = self.t, self.cfg
        rows, side = image.shape[0], cfg.image_size // cfg.patch_size
        projection = t.leaf("vision.projection") if not cfg.frozen else None
        positions = t.leaf("vision.positions") if not cfg.frozen else None
        matrix = 3 * cfg.patch_size**2 * cfg.width * t.full
        patch = t.apply((rows, cfg.width, side**2), t.low, [(projection, matrix)], keep=[image])
        patch = t.cast(t.transpose(patch, (rows, side**2, cfg.width)), t.full)
        token = t.make((rows, 1, cfg.width), t.full)
        hidden = t.concat([token, patch], (rows, 1 + side**2, cfg.width))
        hidden = t.apply(hidden.shape, t.full, [(hidden.node, hidden.count * t.full), (positions, 0)], in_place=True)
        del patch, token
        if cfg.kind == "clip_vit":
            hidden = t.norm(hidden)
        for index in range(cfg.depth):
            hidden = self._next(index, hidden)
        return hidden

    def _next(self, index: int, hidden: Ghost) -> Ghost:
        if self.cfg.recompute and not self.cfg.frozen:
            return self.t.recompute(self._block, index, hidden)
        return call(self._block, index, hidden)

    def _block(self, index: int, hidden: Ghost) -> Ghost:
        t, cfg, trained = self.t, self.cfg, not self.cfg.frozen
        drops = trained and cfg.drop_path_rate and index
        hidden = t.add(hidden, self._drop(call(self._attention, index, t.norm(hidden)), drops))
        inner = t.linear(t.norm(hidden), f"vision.{index}.fc1", cfg.mlp_width // self.ranks, trained=trained)
        inner = t.elementwise(inner, keep=True) if cfg.kind == "eva_vit" else self._quick_gelu(inner)
        return t.add(hidden, self._drop(t.linear(inner, f"vision.{index}.fc2", cfg.width, trained=trained), drops))

    def _attention(self, index: int, hidden: Ghost) -> Ghost:
        t, cfg, trained = self.t, self.cfg, not self.cfg.frozen
        rows, length, width = hidden.shape
        heads, head = cfg.num_heads // self.ranks, width // cfg.num_heads
        qkv = t.linear(hidden, f"vision.{index}.qkv", 3 * heads * head, trained=trained)
        mixed = call(self._attend, *t.split(qkv, 3, (rows, length, heads, head)))
        return t.linear(t.view(mixed, (rows, length, heads * head)), f"vision.{index}.out", width, trained=trained)

    def _attend(self, query: Ghost, key: Ghost, value: Ghost) -> Ghost:
        t = self.t
        rows, length, heads, head = query.shape
        query, key, value = (t.transpose(x, (rows, heads, length, head)) for x in (query, key, value))
        score = t.matmul(t.elementwise(query), key, (rows, heads, length, length))
        share = t.softmax(score)
        out = t.matmul(share, value, (rows, heads, length, head))
        return t.transpose(out, (rows, length, heads, head))

    def _quick_gelu(self, inner: Ghost) -> Ghost:
        t = self.t
        return t.multiply(inner, t.elementwise(t.elementwise(inner), keep_result=True))

    def _drop(self, branch: Ghost, drops: float) -> Ghost:
        t = self.t
        return t.multiply(branch, t.make((branch.shape[0], 1, 1), branch.size)) if drops else branch


@dataclass(frozen=True)
class QFormerPass:
    """blip2x.models.qformer. `vocab_size`: None where it reads no texts."""

    t: Tracer
    cfg: QFormerConfig
    vocab_size: int | None

    def look(self, patch: Ghost) -> ImageCache:
        """Of each layer that looks at the image."""
        every = self.cfg.cross_attention_every
        return [None if i % every else self._keys_values(f"qformer.{i}.cross", patch) for i in range(self.cfg.depth)]

    def encode_image(self, image: Ghost | ImageCache) -> tuple[Ghost, list[KeysValues]]:
        """The queries' output, and the cache."""
        rows = image[0][0].shape[0] if isinstance(image, list) else image.shape[0]
        return self._run(call(self._normalise, self._queries(rows)), queries=self.cfg.num_queries, image=image)

    def encode_text(self, rows: int, length: int) -> Ghost:
        """[B, D]."""
        bias = self.t.make((rows, 1, 1, length), self.t.full)
        hidden, _ = self._run(call(self._normalise, self._embed(rows, length)), queries=0, bias=bias, wanted=1)
        return self.t.transpose(hidden, (rows, self.cfg.width))

    def encode_pair(self, image: Ghost | ImageCache, rows: int, length: int, *, reaches_all: bool = False) -> Ghost:
        """[B, Q, D]."""
        t, cfg, queries = self.t, self.cfg, self.cfg.num_queries
        embeds = t.concat([self._queries(rows), self._embed(rows, length)], (rows, queries + length, cfg.width))
        bias = t.make((rows, 1, 1, queries + length), t.full)
        wanted = None if reaches_all else queries
        hidden, _ = self._run(call(self._normalise, embeds), queries=queries, image=image, bias=bias, wanted=wanted)
        return t.transpose(hidden, (rows, queries, cfg.width)) if reaches_all else hidden

    def caption_logits(self, rows: int, length: int, cache: list[KeysValues]) -> Ghost:
        """[N, V], where all B * L places are asked for."""
        t, cfg = self.t, self.cfg
        bias = t.make((rows, 1, length, cfg.num_queries + length), t.full)
        hidden, _ = self._run(call(self._normalise, self._embed(rows, length)), queries=0, bias=bias, past=cache)
        return call(self._logits, t.transpose(hidden, (rows * length, cfg.width)))

    def _logits(self, hidden: Ghost) -> Ghost:
        t = self.t
        places, width = hidden.shape
        hidden = t.norm(t.elementwise(t.linear(hidden, "qformer.head", width, trained=True), keep=True))
        words = Ghost((self.vocab_size, width), t.full, hidden.memory, t.leaf("qformer.words"))  # its memory is the model's
        logits = t.matmul(hidden, words, (places, self.vocab_size))
        return t.elementwise(logits)  # the bias

    def _embed(self, rows: int, length: int) -> Ghost:
        t, shape = self.t, (rows, length, self.cfg.width)
        words = t.embed("qformer.words", shape, self.vocab_size, trained=True, size=t.full)
        return t.add(words, t.embed("qformer.positions", shape[1:], self.cfg.max_positions, trained=True, size=t.full))

    def _queries(self, rows: int) -> Ghost:
        t, cfg = self.t, self.cfg
        shape = (rows, cfg.num_queries, cfg.width)
        return t.apply(shape, t.full, [(t.leaf("qformer.query_tokens"), cfg.num_queries * cfg.width * t.full)])

    def _normalise(self, embeds: Ghost) -> Ghost:
        return self.t.dropout(self.t.norm(embeds), self.cfg.dropout)

    def _run(
        self,
        hidden: Ghost,
        *,
        queries: int,
        image: Ghost | ImageCache | None = None,
        bias: Ghost | None = None,
        past: list[KeysValues] | None = None,
        wanted: int | None = None,
    ) -> tuple[Ghost, list[KeysValues]]:
        cache = []
        if bias is not None:  # for all heads
            bias = self.t.transpose(bias, (hidden.shape[0], self.cfg.num_heads, hidden.shape[1], bias.shape[3]))
        for index in range(self.cfg.depth):
            compute = self.t.recompute if self.cfg.recompute else call
            hidden, keys_values = compute(
                self._layer,
                index,
                hidden,
                queries,
                image[index] if isinstance(image, list) else image,
                bias,
                None if past is None else past[index],
                wanted if index == self.cfg.depth - 1 else None,
            )
            cache.append(keys_values)
        return hidden, cache

    def _layer(
        self,
        index: int,
        hidden: Ghost,
        queries: int,
        image: Ghost | KeysValues | None,
        bias: Ghost | None,
        past: KeysValues | None,
        wanted: int | None,
    ) -> tuple[Ghost, KeysValues]:
        t, name = self.t, f"qformer.{index}"
        rows, length, width = hidden.shape
        keys_values = self._keys_values(f"{name}.self", hidden)
        if past is not None:
            keys_values = tuple(
                t.concat(pair, (*pair[0].shape[:2], pair[0].shape[2] + length, pair[0].shape[3]))
                for pair in zip(past, keys_values, strict=True)
            )
        if wanted is not None:
            length = wanted
            hidden = t.transpose(hidden, (rows, wanted, width))
            bias = bias and t.transpose(bias, (*bias.shape[:2], wanted, bias.shape[3]))
        hidden = call(self._attention, f"{name}.self", hidden, keys_values, bias)
        parts = []
        if queries:
            query = t.transpose(hidden, (rows, queries, width))
            if index % self.cfg.cross_attention_every == 0:
                looked_at = self._keys_values(f"{name}.cross", image) if isinstance(image, Ghost) else image
                query = call(self._attention, f"{name}.cross", query, looked_at, None)
            parts.append(call(self._feed_forward, f"{name}.query_ffn", query))
        if queries < length:
            parts.append(call(self._feed_forward, f"{name}.text_ffn", t.transpose(hidden, (rows, length - queries, width))))
        return parts[0] if len(parts) == 1 else t.concat(parts, (rows, length, width)), keys_values

    def _keys_values(self, name: str, source: Ghost) -> KeysValues:
        width = self.cfg.width
        return tuple(self._heads(self.t.linear(source, f"{name}.{what}", width, trained=True)) for what in ("key", "value"))

    def _attention(self, name: str, hidden: Ghost, keys_values: KeysValues, bias: Ghost | None) -> Ghost:
        t, cfg = self.t, self.cfg
        key, value = keys_values
        rows, length, width = hidden.shape
        asking = (key.shape[0], rows // key.shape[0] * length, width)
        share = call(self._shares, name, t.view(hidden, asking), key, bias)
        share = t.dropout(share, cfg.dropout)
        out = t.matmul(share, value, (*share.shape[:3], value.shape[3]))
        mixed = t.view(t.transpose(out, asking), hidden.shape)
        del out
        return t.norm(t.add(hidden, t.dropout(t.linear(mixed, f"{name}.out", cfg.width, trained=True), cfg.dropout)))

    def _shares(self, name: str, hidden: Ghost, key: Ghost, bias: Ghost | None) -> Ghost:
        t = self.t
        query = self._heads(t.linear(hidden, f"{name}.query", self.cfg.width, trained=True))
        score = t.matmul(t.elementwise(query), key, (*query.shape[:3], key.shape[2]))
        return t.softmax(score if bias is None else t.add(score, bias))

    def _feed_forward(self, name: str, hidden: Ghost) -> Ghost:
        t, cfg = self.t, self.cfg
        inner = self._gelu(t.linear(hidden, f"{name}.fc1", cfg.mlp_width, trained=True))
        out = call(t.linear, inner, f"{name}.fc2", cfg.width, trained=True)
        del inner
        return t.norm(t.add(hidden, t.dropout(out, cfg.dropout)))

    def _gelu(self, inner: Ghost) -> Ghost:
        return self.t.elementwise(inner, keep=True)

    def _heads(self, hidden: Ghost) -> Ghost:
        rows, length, width = hidden.shape
        heads = self.cfg.num_heads
        return self.t.transpose(hidden, (rows, heads, length, width // heads))


@dataclass(frozen=True)
class LanguagePass:
    """What OPT and T5 have in common. `size`: bytes of a number of the language model; `ranks` share its matrices."""

    t: Tracer
    cfg: OptConfig | T5Config
    vocab_size: int
    size: int
    ranks: int = 1

    @property
    def trained(self) -> bool:
        """Whether it learns, and does not only hand gradients through."""
        return not self.cfg.frozen

    @property
    def dropout(self) -> float:
        """Frozen, it is in evaluation mode."""
        return self.cfg.dropout if self.trained else 0.0

    def embed(self, rows: int, length: int) -> Ghost:
        """[B, L, D]."""
        shape = (rows, length, self.cfg.width)
        return self.t.embed("language.words", shape, self.vocab_size, trained=self.trained, size=self.size)

    def _at_places(self, hidden: Ghost, places: int) -> Ghost:
        return self.t.transpose(hidden, (places, self.cfg.width))


class OptPass(LanguagePass):
    """blip2x.models.language.opt."""

    def __call__(self, embeds: Ghost, places: int) -> Ghost:
        """Logits [N, V] of so many `places`."""
        t, cfg = self.t, self.cfg
        rows, length, _ = embeds.shape
        bias = t.make((rows, cfg.num_heads // self.ranks, length, length), self.size)
        position = t.embed("language.positions", embeds.shape, cfg.max_positions + 2, trained=self.trained, size=self.size)
        hidden = t.dropout(t.add(embeds, position), self.dropout)
        del position
        for index in range(cfg.depth):
            hidden = (t.recompute if cfg.recompute else call)(self._block, index, hidden, bias)
        hidden = self._at_places(hidden, places)
        hidden = t.norm(hidden)
        words = t.leaf("language.words") if self.trained else None
        head = Ghost((self.vocab_size, cfg.width), self.size, hidden.memory, words)  # its memory is the model's
        return t.matmul(hidden, head, (places, self.vocab_size))

    def _block(self, index: int, hidden: Ghost, bias: Ghost) -> Ghost:
        t, cfg, trained, name = self.t, self.cfg, self.trained, f"language.{index}"
        residual = hidden
        hidden = t.norm(hidden)
        hidden, _weights = call(self._attention, name, hidden, bias)  # PaddleNLP's layer names them, so they stay
        hidden = t.add(residual, t.dropout(hidden, self.dropout))
        residual = hidden
        hidden = t.norm(hidden)
        inner = t.elementwise(t.linear(hidden, f"{name}.fc1", cfg.mlp_width // self.ranks, trained=trained), keep_result=True)
        hidden = t.dropout(t.linear(inner, f"{name}.fc2", cfg.width, trained=trained), self.dropout)
        del inner
        return t.add(residual, hidden)

    def _attention(self, name: str, hidden: Ghost, bias: Ghost) -> tuple[Ghost, Ghost]:
        t, cfg = self.t, self.cfg
        rows, length, width = hidden.shape
        heads, head = cfg.num_heads // self.ranks, width // cfg.num_heads
        query, key, value = (
            t.transpose(t.linear(hidden, f"{name}.{what}", heads * head, trained=self.trained), (rows, heads, length, head))
            for what in ("query", "key", "value")
        )
        product = t.matmul(t.elementwise(query), key, (rows, heads, length, length))
        product = t.add(product, bias)
        weights = t.softmax(product)
        out = t.matmul(weights, value, query.shape)
        out = t.transpose(out, (rows, length, heads * head))
        out = t.linear(out, f"{name}.out", width, trained=self.trained)
        return out, weights


class T5Pass(LanguagePass):
    """blip2x.models.language.t5."""

    def __call__(self, embeds: Ghost, length: int) -> Ghost:
        """Logits [B * T, V] of `length` tokens."""
        t, cfg = self.t, self.cfg
        memory = call(self._encode, embeds)
        rows = embeds.shape[0]
        bias = self._bias("decoder", rows, length)
        hidden = t.dropout(self.embed(rows, length), self.dropout)
        memory_bias = t.make((rows, cfg.num_heads // self.ranks, length, embeds.shape[1]), self.size)
        for index in range(cfg.decoder_depth):
            hidden = self._next(f"language.decoder.{index}", hidden, bias, memory, memory_bias)
        hidden = self._at_places(hidden, rows * length)
        hidden = t.dropout(self._norm(hidden), self.dropout)
        return t.linear(hidden, "language.lm_head", self.vocab_size, trained=self.trained, bias=False)

    def _encode(self, embeds: Ghost) -> Ghost:
        rows, length, _ = embeds.shape
        bias = self._bias("encoder", rows, length)
        hidden = self.t.dropout(embeds, self.dropout)
        for index in range(self.cfg.encoder_depth):
            hidden = self._next(f"language.encoder.{index}", hidden, bias, None, None)
        return self.t.dropout(self._norm(hidden), self.dropout)

    def _bias(self, stack: str, rows: int, length: int) -> Ghost:
        t, heads = self.t, self.cfg.num_heads // self.ranks
        node = t.leaf(f"language.{stack}.relative") if self.trained else None
        one = t.apply((1, heads, length, length), self.size, [(node, 0)])
        return t.apply((rows, heads, length, length), self.size, [(one.node, one.count * one.size)])  # with the mask

    def _next(self, name: str, hidden: Ghost, bias: Ghost, memory: Ghost | None, memory_bias: Ghost | None) -> Ghost:
        return (self.t.recompute if self.cfg.recompute else call)(self._block, name, hidden, bias, memory, memory_bias)

    def _block(self, name: str, hidden: Ghost, bias: Ghost, memory: Ghost | None, memory_bias: Ghost | None) -> Ghost:
        t = self.t
        hidden = t.add(hidden, call(self._attention, f"{name}.self", self._norm(hidden), None, bias))
        if memory is not None:
            hidden = t.add(hidden, call(self._attention, f"{name}.cross", self._norm(hidden), memory, memory_bias))
        return t.add(call(self._feed_forward, name, self._norm(hidden)), hidden)

    def _norm(self, hidden: Ghost) -> Ghost:
        t = self.t
        exact = t.cast(hidden, t.full)
        scale = t.elementwise(t.reduce(t.multiply(exact, exact), (*hidden.shape[:-1], 1)), keep_result=True)
        weight = Ghost((hidden.shape[-1],), hidden.size, hidden.memory)
        return t.multiply(t.cast(t.multiply(exact, scale), hidden.size), weight)

    def _attention(self, name: str, hidden: Ghost, memory: Ghost | None, bias: Ghost) -> Ghost:
        t, cfg = self.t, self.cfg
        rows, asking, width = hidden.shape
        heads, head = cfg.num_heads // self.ranks, cfg.head_width

        def project(what: str, source: Ghost) -> Ghost:
            projected = t.linear(source, f"{name}.{what}", heads * head, trained=self.trained, bias=False)
            return t.transpose(projected, (rows, heads, source.shape[1], head))

        query = project("query", hidden)
        key, value = project("key", memory or hidden), project("value", memory or hidden)
        score = t.matmul(query, key, (rows, heads, asking, key.shape[2]))
        score = t.add(score, bias)
        share = t.dropout(t.cast(t.softmax(score), self.size), self.dropout)
        out = t.transpose(t.matmul(share, value, query.shape), (rows, asking, heads * head))
        out = t.linear(out, f"{name}.out", width, trained=self.trained, bias=False)
        return t.dropout(out, self.dropout)

    def _feed_forward(self, name: str, hidden: Ghost) -> Ghost:
        t, width = self.t, self.cfg.mlp_width // self.ranks
        gate = t.elementwise(t.linear(hidden, f"{name}.wi_0", width, trained=self.trained, bias=False), keep=True)
        line = t.linear(hidden, f"{name}.wi_1", width, trained=self.trained, bias=False)
        inner = t.dropout(t.multiply(gate, line), self.dropout)
        out = t.linear(inner, f"{name}.wo", self.cfg.width, trained=self.trained, bias=False)
        return t.dropout(out, self.dropout)
