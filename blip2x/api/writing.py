"""A BLIP-2 of stage 2: it writes about images.

B images, Q queries, P patches, N texts, L prompt tokens, R results per prompt, T new tokens, V width of the image encoder,
D width of the Q-Former, M width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import paddle
from paddle import Tensor, nn
from PIL import Image

from blip2x.api.inputs import PictureReader, as_texts, ids_and_mask
from blip2x.data.tokenize import TextTokenizer
from blip2x.errors import UserError
from blip2x.generation.decode import GenerationOutput, generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage2 import Stage2Model, join_prefix, shared_prefix
from blip2x.models.prefix import Prefix, SharedPrefix, SharedQueries
from blip2x.tasks.common.captioning import Text, texts_of
from blip2x.tasks.common.conversation import Asker, prompt_room

Images = Sequence[Image.Image] | Image.Image


@dataclass(frozen=True)
class Generated:
    """What was written; the R results of a prompt stand together, best first."""

    texts: list[str] | None  # N x R; None: the model has no tokenizer
    ids: np.ndarray  # int64 [N x R, T], padded behind the end token; T5's rows begin with the decoder's start token
    scores: np.ndarray  # float32 [N x R]: sum of log-probabilities / length ** length_penalty


class WritingModel:
    """Image encoder, Q-Former, projection and language model, in evaluation mode.

    Attributes:
        network: the `Stage2Model`, a paddle layer.
        report: what was loaded from where, line by line.
    """

    def __init__(
        self,
        network: Stage2Model,
        reader: PictureReader,
        tokenizer: TextTokenizer | None,
        *,
        report: list[str],
        eos_token_id: int,
        pad_token_id: int,
        start_token_id: int,
        image_token_id: int | None,
    ):
        self.network = network
        self.report = report
        self._reader = reader
        self._tokenizer = tokenizer
        self._eos, self._pad, self._start = eos_token_id, pad_token_id, start_token_id
        self._image_token = image_token_id

    @paddle.no_grad()
    def encode_image(
        self,
        images: Images | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        output: Literal["queries", "patches", "projected"] = "queries",
    ) -> np.ndarray:
        """What the model sees in images, float32.

        Args:
            images: PIL pictures.
            pixel_values: or arrays [B, 3, S, S], resized and normalised.
            output: "queries" [B, Q, D], the Q-Former's output; "patches" [B, P, V], the image encoder's behind `ln_vision`;
                "projected" [B, Q, M], as the language model reads the queries.

        Raises:
            UserError: inputs of another shape, or an unknown `output`.
        """
        if output not in ("queries", "patches", "projected"):
            raise UserError(f"output={output!r} is none of queries, patches, projected")
        features = self.network.ln_vision(self.network.vision(self._reader(images, pixel_values)))
        if output != "patches":
            features, _ = self.network.qformer.encode_image(features)
        if output == "projected":
            features = self.network.language_proj(features)
        return features.astype("float32").numpy()

    @paddle.no_grad()
    def generate(
        self,
        images: Images | None = None,
        *,
        pixel_values: np.ndarray | None = None,
        prompt: str | Sequence[str] | None = None,
        input_ids: np.ndarray | None = None,
        attention_mask: np.ndarray | None = None,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        early_stopping: bool = False,
        num_return_sequences: int = 1,
        do_sample: bool = False,
        top_p: float = 1.0,
        top_k: int = 0,
        temperature: float = 1.0,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        return_output: bool = False,
    ) -> list[str] | np.ndarray | Generated:
        """Write behind each image's prompt; lengths count new tokens, and options mean what they do in transformers 4.57.

        Args:
            images: PIL pictures.
            pixel_values: or arrays [B, 3, S, S], resized and normalised.
            prompt: a text for each image, or one for all; several for a single image, which is encoded once; None: captions.
            input_ids: or the prompts' ids [N, L]. A decoder's begin with its first token ("</s>") and are padded on the left;
                the placeholders that Hugging Face's processor puts in front are left out.
            attention_mask: of `input_ids`, 1 on tokens and 0 on padding; None: all count.
            max_new_tokens: at most so many, the end token included.
            min_new_tokens: no end before.
            num_beams: 1 is greedy decoding, or sampling with `do_sample`.
            length_penalty: beams score sum of log-probabilities / length ** length_penalty.
            repetition_penalty: above 1 makes tokens that were written less likely; those of the prompt do not count, as in
                transformers where it is given embeddings.
            early_stopping: with beams, stop as soon as `num_beams` texts have ended.
            num_return_sequences: results per prompt.
            do_sample: draw tokens by probability; ``paddle.seed`` makes it repeatable.
            top_p: sampling: smallest set of tokens with this probability.
            top_k: sampling: the k likeliest tokens; 0: all.
            temperature: sampling: above 1 evens the probabilities out.
            eos_token_id: the end; None: the weights' own.
            pad_token_id: fills rows behind their end; None: the weights' own.
            return_output: give a `Generated` with texts, ids and scores.

        Returns:
            N x R texts; or int64 ids [N x R, T] where `input_ids` was given or the model has no tokenizer.

        Raises:
            UserError: inputs that do not fit each other or the model, or options that exclude each other.
        """
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            num_beams=num_beams,
            do_sample=do_sample,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            num_return_sequences=num_return_sequences,
            early_stopping=early_stopping,
        )
        image_BCHW = self._reader(images, pixel_values)
        language = self.network.language
        ids_NL, mask_NL = self._prompt(prompt, input_ids, attention_mask)
        prefix = _prefix(language, self.network.encode(image_BCHW), ids_NL, mask_NL)
        out = self._write(prefix, settings, eos_token_id, pad_token_id)
        speaks_ids = input_ids is not None or self._tokenizer is None
        if speaks_ids and not return_output:
            return self._with_start(out.ids)
        texts = [self._tokenizer.decode(row) for row in out.ids] if self._tokenizer else None
        return Generated(texts, self._with_start(out.ids), out.scores) if return_output else texts

    @paddle.no_grad()
    def answer(
        self,
        images: Images,
        questions: Sequence[str],
        *,
        prompt: str = "Question: {} Answer:",
        chat: bool = False,
        batch_size: int = 16,
        **options: Any,
    ) -> list[list[str]]:
        """Answer all questions about each image, which is encoded once.

        Args:
            images: PIL pictures.
            questions: in the order in which they are asked of each image.
            prompt: "{}" in it is replaced by a question.
            chat: the questions before, and their answers, stand before each; where OPT has no room, without the oldest.
            batch_size: questions at a time.
            options: of decoding, as `generate` has them from `max_new_tokens` to `temperature`, with its defaults.

        Returns:
            Per image an answer, the best one, per question.

        Raises:
            UserError: the model has no tokenizer, no question, a prompt without "{}", or options that exclude each other.
        """
        if self._tokenizer is None:
            raise UserError("this model has no tokenizer, as none came with its weights; use generate with input_ids=")
        if isinstance(questions, str) or not questions or "{}" not in prompt:
            raise UserError(f"give a list of questions and a prompt with {{}} for each, got {questions!r} and {prompt!r}")
        settings, language = GenerationSettings(**{"max_new_tokens": 30, **options}), self.network.language
        positions = getattr(language, "max_positions", np.inf)  # T5's, which are relative, have no limit
        room = prompt_room(positions, self.network.qformer.num_queries, settings.max_new_tokens)

        def write(queries: SharedQueries, images: list[int], prompts: list[str]) -> list[list[Text]]:
            prefix = shared_prefix(language, queries, np.array(images), *self._prompt(prompts, None, None))
            out = self._write(prefix, settings, None, None)
            return texts_of(out, self._tokenizer, settings)

        def fits(text: str) -> bool:
            return len(self._tokenizer.tokens(text)) <= room

        asker = Asker(language.share, write, template=prompt, chat=chat, fits=fits, batch_size=batch_size)
        query_BQM = self.network.encode(self._reader(images, None))
        replies = asker.ask(query_BQM, [list(questions)] * query_BQM.shape[0])
        return [[reply.texts[0].text for reply in own] for own in replies]

    def _write(
        self, prefix: Prefix | SharedPrefix, settings: GenerationSettings, eos: int | None, pad: int | None
    ) -> GenerationOutput:
        return generate(
            self.network.language,
            prefix,
            settings,
            eos_id=self._eos if eos is None else eos,
            pad_id=self._pad if pad is None else pad,
            start_id=self.network.language.start_id,
        )

    def _prompt(self, prompt: Any, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
        if prompt is not None and input_ids is not None:
            raise UserError("give either prompt= or input_ids=, and not both")
        language = self.network.language
        if input_ids is not None:
            return self._without_placeholders(*ids_and_mask(input_ids, attention_mask, language.vocab_size))
        if self._tokenizer is None:
            if prompt is not None:
                raise UserError(
                    "this model has no tokenizer, as none came with its weights; give input_ids= in place of prompt="
                )
            return ids_and_mask(np.array([[self._start]]), None, language.vocab_size)
        texts = as_texts("" if prompt is None else prompt)
        side = "right" if language.is_encoder_decoder else "left"  # T5 counts the places between queries and prompt
        ids, mask = self._tokenizer.encode(texts, max_length=None, padding_side=side, add_end=language.is_encoder_decoder)
        return ids_and_mask(ids, mask, language.vocab_size)

    def _without_placeholders(self, ids_NL: Tensor, mask_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Hugging Face's processor puts a token per query before a prompt, in whose place the queries themselves stand here."""
        is_placeholder_NL = ids_NL == (-1 if self._image_token is None else self._image_token)
        queries, (rows, length) = self.network.qformer.num_queries, ids_NL.shape
        if not bool((is_placeholder_NL.sum(axis=1) == queries).all()) or length == queries:
            return ids_NL, mask_NL
        words_NL = paddle.logical_not(is_placeholder_NL)
        return ids_NL[words_NL].reshape([rows, -1]), mask_NL[words_NL].reshape([rows, -1])

    def _with_start(self, ids_NT: np.ndarray) -> np.ndarray:
        start = self.network.language.start_id
        return ids_NT if start is None else np.insert(ids_NT, 0, start, axis=1)


def _prefix(language: nn.Layer, query_BQM: Tensor, ids_NL: Tensor, mask_NL: Tensor) -> Prefix | SharedPrefix:
    """One image for all prompts, one prompt for all images, or as many of both."""
    images, prompts = query_BQM.shape[0], ids_NL.shape[0]
    if images == prompts:
        return join_prefix(language, query_BQM, ids_NL, mask_NL)
    if images == 1:
        return shared_prefix(language, language.share(query_BQM), np.zeros(prompts, np.int64), ids_NL, mask_NL)
    if prompts == 1:
        return join_prefix(language, query_BQM, ids_NL.expand([images, -1]), mask_NL.expand([images, -1]))
    raise UserError(f"{images} images and {prompts} prompts: give one for all, or as many of both")
