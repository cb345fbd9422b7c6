"""A training step's way from its batches to the gradients with ghosts: the objectives' forward passes, see `passes`.

B pairs of a micro-batch, K pairs that are compared, Q queries, P patches, D width, E width of the shared space, L text tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blip2x.config.model import ModelConfig, OptConfig
from blip2x.config.task import PretrainStage1Config
from blip2x.models.memory.ghosts import Ghost, Tracer, call
from blip2x.models.memory.passes import ImageCache, KeysValues, LanguagePass, OptPass, QFormerPass, T5Pass, VisionPass

ID = 8  # bytes of a token's number


@dataclass(frozen=True)
class Extent:
    """How big a micro-batch is, how many there are, and who shares them.

    Attributes:
        rows: samples of a micro-batch.
        length: tokens of a text; of what the encoder reads, where there is one.
        output_length: tokens that an encoder-decoder writes.
        accumulate: micro-batches of a step.
        data_ranks: ranks with different samples.
        language_ranks: ranks that share the language model's matrices.
        vision_ranks: ranks that share the image encoder's.
        question_length: tokens of a question that the Q-Former reads.
    """

    rows: int
    length: int
    output_length: int = 0
    accumulate: int = 1
    data_ranks: int = 1
    language_ranks: int = 1
    vision_ranks: int = 1
    question_length: int = 0


@dataclass(frozen=True)
class Objective(ABC):
    """What the objectives share.

    Args:
        t: counts.
        cfg: the model.
        extent: of the batches.
        language_size: bytes of a number between the language model's layers.
        vocab_sizes: "qformer" and "language" -> number of words.
    """

    t: Tracer
    cfg: ModelConfig
    extent: Extent
    language_size: int
    vocab_sizes: Mapping[str, int]

    def step(self) -> None:
        """Go through the first micro-batch, while the others wait, and back."""
        with self.t.of("batch"):
            batches = [self.batch() for _ in range(self.extent.accumulate)]
        batches = self.prepare(batches)
        batch = batches.pop(0)  # the loop names it until the next one
        loss = call(self.forward, batch)
        self.t.backward(loss.node)

    @abstractmethod
    def batch(self) -> dict[str, Ghost]:
        """A micro-batch."""

    def prepare(self, batches: list[dict[str, Ghost]]) -> list[dict[str, Ghost]]:
        """What comes before the first forward pass."""
        return batches

    @abstractmethod
    def forward(self, batch: dict[str, Ghost]) -> Ghost:
        """The loss."""

    def images(self) -> Ghost:
        """[B, 3, S, S]."""
        side = self.cfg.vision.image_size
        return self.t.make((self.extent.rows, 3, side, side), 4)

    def texts(self, length: int, tensors: int) -> Ghost:
        """Token numbers and masks, in one."""
        return self.t.make((self.extent.rows, length, tensors), ID)

    def see(self, image: Ghost) -> Ghost:
        """Through the image encoder."""
        with self.t.of("vision"):
            return call(VisionPass(self.t, self.cfg.vision, self.extent.vision_ranks), image)

    def normalise(self, encoded: Ghost) -> Ghost:
        """Through the norm behind it, whose weights are trained."""
        t = self.t
        with t.of("ln_vision"):
            return t.norm(encoded, "ln_vision")

    def qformer(self, *, reads_texts: bool) -> QFormerPass:
        """The Q-Former."""
        return QFormerPass(self.t, self.cfg.qformer, self.vocab_sizes["qformer"] if reads_texts else None)

    def language(self) -> LanguagePass:
        """The language model."""
        passes = OptPass if isinstance(self.cfg.language, OptConfig) else T5Pass
        words, ranks = self.vocab_sizes["language"], self.extent.language_ranks
        return passes(self.t, self.cfg.language, words, self.language_size, ranks)

    def lm_loss(self, logits: Ghost, *, smoothing: bool = False) -> Ghost:
        """Cross-entropy per token, and its mean."""
        t = self.t
        logits = t.cast(logits, t.full)
        places = logits.shape[:-1]
        share = t.make(logits.shape, t.full)
        loss = t.apply(places, t.full, [(logits.node, logits.count * logits.size)], keep=[share])
        del share
        if smoothing:
            loss = t.add(loss, t.add(t.reduce(logits, places, keep=True), t.reduce(logits, places)))
        return t.reduce(loss, (1,))


@dataclass(frozen=True)
class Vision(Objective):
    """Labels of patches; `classes`: of each kind of label."""

    classes: Sequence[int] = ()

    def batch(self) -> dict[str, Ghost]:
        """Images and labels."""
        cfg = self.cfg.vision
        count = (cfg.image_size // cfg.patch_size) ** 2 * len(self.classes)
        return {"image": self.images(), "labels": self.texts(count, 1)}

    def forward(self, batch: dict[str, Ghost]) -> Ghost:
        """The sum over kinds of labels."""
        t = self.t
        hidden = self.see(batch["image"])
        with t.of("heads"):
            rows, length, width = hidden.shape
            patch = t.norm(t.transpose(hidden, (rows, length - 1, width)))
            logits = [t.linear(patch, f"heads.{index}", count, trained=True) for index, count in enumerate(self.classes)]
            losses = [self.lm_loss(one) for one in logits]
            total = losses[0]
            for loss in losses[1:]:
                total = t.add(total, loss)
            return total


@dataclass(frozen=True)
class Language(Objective):
    """Texts alone; all that can be predicted of them is."""

    def batch(self) -> dict[str, Ghost]:
        """Texts."""
        return {"text": self.texts(self.extent.length + self.extent.output_length, 2), "places": self.places()}

    def places(self) -> Ghost:
        """Of the targets, [N]."""
        return self.texts(self.extent.output_length or self.extent.length, 1)

    def forward(self, batch: dict[str, Ghost]) -> Ghost:
        """Next-token prediction."""
        with self.t.of("language"):
            language = self.language()
            embeds = language.embed(self.extent.rows, self.extent.length)
            return self.read(language, embeds)

    def read(self, language: LanguagePass, embeds: Ghost) -> Ghost:
        """The loss of the texts; a decoder-only model predicts all but the first token: bos, or what nothing comes before."""
        extent = self.extent
        asked = extent.output_length if isinstance(language, T5Pass) else extent.rows * (extent.length - 1)
        return self.lm_loss(call(language, embeds, asked))


@dataclass(frozen=True)
class Stage2(Language):
    """Images and texts: stage 2, and fine-tuning."""

    def batch(self) -> dict[str, Ghost]:
        """Images and texts."""
        text = self.texts(self.extent.length + self.extent.output_length, 3)
        return {"image": self.images(), "text": text, "places": self.places()}

    def forward(self, batch: dict[str, Ghost]) -> Ghost:
        """Next-token prediction behind the queries."""
        query = call(self.encode, batch["image"])
        with self.t.of("language"):
            language = self.language()
            return self.read(language, self._join(query, language))

    def _join(self, query: Ghost, language: LanguagePass) -> Ghost:
        t, extent = self.t, self.extent
        text = t.cast(language.embed(extent.rows, extent.length), query.size)
        shape = (extent.rows, query.shape[1] + extent.length, query.shape[2])
        return t.cast(t.concat([query, text], shape), self.language_size)

    def encode(self, image: Ghost) -> Ghost:
        """The soft prompt."""
        patch = self.normalise(self.see(image))
        with self.t.of("qformer"):
            query, _ = call(self.qformer(reads_texts=False).encode_image, patch)
        return self.project(query)

    def project(self, query: Ghost) -> Ghost:
        """To the language model's width."""
        with self.t.of("heads"):
            return self.t.linear(query, "language_proj", self.cfg.language.width, trained=True)


@dataclass(frozen=True)
class Answering(Stage2):
    """Fine-tuning on questions, which the Q-Former reads, too."""

    def batch(self) -> dict[str, Ghost]:
        """Images, questions, and texts."""
        return super().batch() | {"question": self.texts(self.extent.question_length, 2)}

    def encode(self, image: Ghost) -> Ghost:
        """The soft prompt of images that are looked at with a question in mind."""
        patch = self.normalise(self.see(image))
        with self.t.of("qformer"):
            encode, extent = self.qformer(reads_texts=True).encode_pair, self.extent
            query = call(encode, patch, extent.rows, extent.question_length, reaches_all=True)
        return self.project(query)


@dataclass(frozen=True)
class Stage1(Objective):
    """Contrast, matching and captions; `task` says which of them, and how."""

    task: PretrainStage1Config | None = None

    def batch(self) -> dict[str, Ghost]:
        """Images and texts."""
        return {"image": self.images(), "text": self.texts(self.extent.length, 2)}

    def prepare(self, batches: list[dict[str, Ghost]]) -> list[dict[str, Ghost]]:
        """With cached contrast: features of all micro-batches, and the pairs that each is matched with."""
        if not self.task.cached_contrast:
            return batches
        t, frozen = self.t, self.cfg.vision.frozen
        with t.no_grad():
            encoded, images, texts = [], [], []
            for batch in batches:
                encoded.append(self.see(batch["image"]) if frozen else None)
                _, image, text, _ = self._features(encoded[-1] or self.see(batch["image"]), self.extent.length)
                images.append(image)
                texts.append(text)
            other = [self._chosen(one if frozen else batch["image"]) for one, batch in zip(encoded, batches, strict=True)]
        return [
            batch | {"encoded": one, "other": two, "features": three, "text_features": four}
            for batch, one, two, three, four in zip(batches, encoded, other, images, texts, strict=True)
        ]

    def forward(self, batch: dict[str, Ghost]) -> Ghost:
        """The sum of the losses that are computed."""
        t, task, cached = self.t, self.task, "features" in batch
        encoded = batch.get("encoded") or self.see(batch["image"])
        looked, image, text, cache = self._features(encoded, self.extent.length)
        loss = t.reduce(self._scores(image, text), (1,))
        if task.itm_weight:
            other = batch["other"] if cached else self._from_ranks(encoded)
            loss = t.add(loss, self._match(looked, other, is_picture=cached and not self.cfg.vision.frozen))
            del other
        if task.lm_weight:
            with t.of("qformer"):
                loss = t.add(loss, self._caption(cache))
        return loss

    def _features(self, encoded: Ghost, length: int) -> tuple[ImageCache, Ghost, Ghost, list[KeysValues]]:
        t, cfg, rows = self.t, self.cfg.qformer, self.extent.rows
        looked = self._look(encoded)
        with t.of("qformer"):
            query, cache = self.qformer(reads_texts=True).encode_image(looked)
        with t.of("heads"):
            image = self._unit(t.linear(query, "vision_proj", cfg.embed_dim, trained=True))
        with t.of("qformer"):
            text = self.qformer(reads_texts=True).encode_text(rows, length)
        with t.of("heads"):
            text = self._unit(t.linear(text, "text_proj", cfg.embed_dim, trained=True))
        return looked, image, text, cache

    def _look(self, encoded: Ghost) -> ImageCache:
        patch = self.normalise(encoded)
        with self.t.of("qformer"):
            return self.qformer(reads_texts=True).look(patch)

    def _unit(self, x: Ghost) -> Ghost:
        t = self.t
        x = t.cast(x, t.full)
        return t.multiply(x, t.reduce(x, (*x.shape[:-1], 1), keep=True))

    def _gathered(self, x: Ghost, *, gradient: bool) -> Ghost:
        """Of all data ranks: its parts, and the whole."""
        t, ranks = self.t, self.extent.data_ranks
        if ranks == 1:
            return x if gradient else Ghost(x.shape, x.size, x.memory)
        node = x.node if gradient else None
        shape, size = (x.shape[0] * ranks, *x.shape[1:]), x.count * x.size
        return t.apply(shape, x.size, [(node, size)], scratch=size * ranks, scratch_back=size * ranks)

    def _scores(self, image: Ghost, text: Ghost) -> Ghost:
        t = self.t
        with t.of("heads"):
            rows, queries, _ = image.shape
            gradient = self.task.gather_gradient and not self.task.cached_contrast
            if self.task.cached_contrast:
                return t.multiply(image, t.make(image.shape, t.full))
            all_image, all_text = self._gathered(image, gradient=gradient), self._gathered(text, gradient=gradient)
            pairs = all_text.shape[0]
            i2t, t2i = t.matmul(image, all_text, (rows, queries, pairs)), t.matmul(all_image, text, (pairs, queries, rows))
            return t.add(t.reduce(i2t, (rows, pairs), keep=True), t.reduce(t2i, (rows, pairs), keep=True))

    def _from_ranks(self, encoded: Ghost) -> Ghost | None:
        """An image for each text; None: all are of this rank, whose keys and values are there."""
        return self._chosen(encoded) if self.extent.data_ranks > 1 else None

    def _chosen(self, encoded: Ghost) -> Ghost:
        """An image for each text, among those of all ranks."""
        with self.t.of("vision"):
            return self.t.transpose(self._gathered(encoded, gradient=not self.cfg.vision.frozen), encoded.shape)

    def _match(self, looked: ImageCache, other: Ghost | None, *, is_picture: bool) -> Ghost:
        """`other`: what images of elsewhere are made of; None: those of this batch are taken."""
        t, rows = self.t, self.extent.rows
        own = self._decide(looked, 2 * rows)
        if other is None:
            with t.of("qformer"):
                chosen = [pair and tuple(t.transpose(each, each.shape) for each in pair) for pair in looked]
        else:
            chosen = self._look(self.see(other) if is_picture else other)
        return t.add(own, self._decide(chosen, rows))

    def _decide(self, looked: ImageCache, rows: int) -> Ghost:
        t = self.t
        with t.of("qformer"):
            pair = call(self.qformer(reads_texts=True).encode_pair, looked, rows, self.extent.length)
        with t.of("heads"):
            return t.reduce(t.linear(pair, "itm_head", 2, trained=True), (1,))

    def _caption(self, cache: list[KeysValues]) -> Ghost:
        extent = self.extent
        logits = self.qformer(reads_texts=True).caption_logits(extent.rows, extent.length - 1, cache)
        return self.lm_loss(logits, smoothing=self.task.label_smoothing > 0)
