"""What writing about images has in common: collation, prompts, decoding, and the validation by loss and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.config.task import CaptionConfig, PretrainStage2Config, ValidationConfig
from blip2x.data.collate import Collate, Stage2Collate, Stage2EncoderDecoderCollate, Transform
from blip2x.data.samples import CaptionSample
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.progress import show_captions
from blip2x.engine.run import Run
from blip2x.generation.decode import GenerationOutput, generate
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.caption import CaptionScores, caption_scores
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model, join_prefix, shared_prefix
from blip2x.models.prefix import SharedQueries
from blip2x.models.qformer.captioner import QFormerCaptioner
from blip2x.models.qformer.qformer import Cache
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.tasks.common.attention import draw_looks, keep_shares
from blip2x.tasks.common.loading import Share, eval_transform
from blip2x.tasks.common.merge import gather_rows
from blip2x.tasks.common.pictures import EXAMPLES, opened

VALIDATION_METRICS = ("ROUGE_L", "CIDEr")  # while a model is trained: what takes no time, each a single number
_SHOWN = 3  # captions in the terminal per validation


@dataclass(frozen=True)
class Text:
    """A generated text and its score (see `GenerationOutput`)."""

    text: str
    score: float


def stage2_collate(task: PretrainStage2Config | CaptionConfig, tokenizer: TextTokenizer, transform: Transform) -> Collate:
    """The collate of the language model's family."""
    if tokenizer.family == "t5":
        split = isinstance(task, PretrainStage2Config) and task.prefix_split
        return Stage2EncoderDecoderCollate(transform, tokenizer, task.max_txt_len, task.prompt, split)
    return Stage2Collate(transform, tokenizer, task.max_txt_len, task.prompt)


def encode_prompts(tokenizer: TextTokenizer, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """What a language model reads behind the queries before it writes: token numbers and mask, both [B, L]."""
    # An encoder reads its text as in training, closed by the end token and without a gap behind the queries, which would shift
    # its relative positions; a decoder goes on where the prompt stops, and counts tokens only.
    encodes = tokenizer.family == "t5"
    return tokenizer.encode(prompts, max_length=None, padding_side="right" if encodes else "left", add_end=encodes)


def write_texts(
    model: Stage2Model,
    tokenizer: TextTokenizer,
    query_BQD: Tensor | None,
    prompts: Sequence[str],
    settings: GenerationSettings,
) -> list[list[Text]]:
    """For each prompt the generated texts, best first; `query_BQD` None: the language model sees no image."""
    language, (ids_BL, mask_BL) = model.language, map(paddle.to_tensor, encode_prompts(tokenizer, prompts))
    return _decode(language, join_prefix(language, query_BQD, ids_BL, mask_BL), tokenizer, settings)


def write_about(
    model: Stage2Model,
    tokenizer: TextTokenizer,
    queries: SharedQueries,
    image_B: Sequence[int],
    prompts: Sequence[str],
    settings: GenerationSettings,
) -> list[list[Text]]:
    """As `write_texts`, where several prompts are about one image: prompt b about the one in row image_B[b] of `queries`."""
    language, (ids_BL, mask_BL) = model.language, map(paddle.to_tensor, encode_prompts(tokenizer, prompts))
    prefix = shared_prefix(language, queries, np.asarray(image_B, np.int64), ids_BL, mask_BL)
    return _decode(language, prefix, tokenizer, settings)


def write_captions(
    model: Stage1Model, tokenizer: TextTokenizer, image_BCHW: Tensor, settings: GenerationSettings
) -> list[list[Text]]:
    """For each image the captions that the Q-Former of stage 1 writes alone, best first."""
    *_, cache = model.image_features(image_BCHW)
    return captions_behind(model, tokenizer, cache, settings)


def captions_behind(
    model: Stage1Model, tokenizer: TextTokenizer, cache: Cache, settings: GenerationSettings
) -> list[list[Text]]:
    """As `write_captions`, for images whose queries are in `cache` already."""
    return _decode(QFormerCaptioner(model.qformer, dec_id=tokenizer.dec_id), cache, tokenizer, settings)


def _decode(decoder: Any, prefix: Any, tokenizer: TextTokenizer, settings: GenerationSettings) -> list[list[Text]]:
    end_id, pad_id = tokenizer.end_id, tokenizer.pad_id
    out = generate(decoder, prefix, settings, eos_id=end_id, pad_id=pad_id, start_id=decoder.start_id)
    return texts_of(out, tokenizer, settings)


def texts_of(out: GenerationOutput, tokenizer: TextTokenizer, settings: GenerationSettings) -> list[list[Text]]:
    """For each prefix the texts that `settings` gave, best first."""
    texts = [Text(tokenizer.decode(ids), float(score)) for ids, score in zip(out.ids, out.scores, strict=True)]
    each = settings.num_return_sequences
    return [texts[start : start + each] for start in range(0, len(texts), each)]


def validation_settings(cfg: ValidationConfig) -> GenerationSettings | None:
    """How captions are written in a validation; None: none are."""
    if not cfg.captions:
        return None
    return GenerationSettings(num_beams=cfg.num_beams, max_new_tokens=cfg.max_new_tokens, min_new_tokens=cfg.min_new_tokens)


def first(limit: int | None, places: Sequence[int]) -> list[int]:
    """Which rows of a batch, whose samples have these places, are of the first `limit` samples; None: all."""
    return [row for row, place in enumerate(places) if limit is None or place < limit]


def score_captions(
    run: Run, captions: dict[int, str], references: dict[int, tuple[str, ...]], names: Sequence[str]
) -> CaptionScores:
    """As `caption_scores`; what cannot be computed, or not as usual, is a warning."""
    scores = caption_scores(captions, references, names)
    for name, reason in scores.failures.items():
        run.console.print(f"warning: {name} could not be computed: {reason}", style="yellow", markup=False)
    for note in scores.notes:
        run.console.print(f"warning: {note}", style="yellow", markup=False)
    return scores


def validation_scores(
    run: Run, samples: Sequence[CaptionSample], captions: Sequence[str], names: Sequence[str]
) -> dict[str, float]:
    """Scores of one caption per sample, the same on every rank; the first few captions go to the terminal's live display.

    All ranks must call it, with what `gather_rows` gave.
    """

    def score() -> dict[str, float]:
        references = {place: sample.captions for place, sample in enumerate(samples)}
        scores = score_captions(run, dict(enumerate(captions)), references, names).scores
        said = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        shown = [f"{sample.image.name}: {caption}" for sample, caption in zip(samples[:_SHOWN], captions[:_SHOWN], strict=True)]
        if not show_captions(run.console, shown):
            run.console.print(f"{len(captions)} captions  {said}", markup=False, highlight=False)
            for line in shown:
                run.console.print(f"  {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
        run.show_examples(
            lambda: [
                {"image": opened(sample.image), "caption": caption, "references": sample.captions}
                for sample, caption in list(zip(samples, captions, strict=True))[:EXAMPLES]
            ]
        )
        return scores

    return run.context.on_main(score)


class HeldOutCaptions:
    """Loss and captions of held-out images; each image is encoded once for both.

    Attributes:
        rows: of the last call, for each captioned image that could be read: image_id, caption, captions, score; with `looks`
            for a few also shares [Q, 1 + P], see `watch_queries`.

    Args:
        cfg: the whole config.
        run: the task's run.
        model: a model of stage 2, in evaluation mode when a method is called.
        tokenizer: the language model's.
        samples: one per image.
        settings: how to decode; None: no captions.
        limit: caption the first ones only; None: all.
        names: of the captions' metrics.
        looks: whether it is kept of a few images where the queries looked.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run: Run,
        model: Stage2Model,
        tokenizer: TextTokenizer,
        samples: Sequence[CaptionSample],
        *,
        settings: GenerationSettings | None,
        limit: int | None,
        names: Sequence[str] = VALIDATION_METRICS,
        looks: bool = False,
    ):
        self._cfg, self._run, self._model, self._tokenizer, self._samples = cfg, run, model, tokenizer, samples
        self._settings, self._limit, self._names = settings, limit, names
        self._looked_at = draw_looks(range(len(samples))) if looks else frozenset()
        self._shares: dict[int, np.ndarray] = {}
        self._blind: float | None = None
        self.rows: list[dict[str, Any]] = []

    @paddle.no_grad()
    def caption(self) -> None:
        """Write captions alone, to `rows`. All ranks must call it."""
        share, rows = Share.of_images(self._cfg, self._run, self._samples, "caption", self._model), []
        for places, batch in share:
            rows += self._write(places, self._encode(places, self._model.encoded(to_tensors(batch))))
        self.rows = gather_rows(self._run.context, rows, share.found)

    @paddle.no_grad()
    def caption_blind(self) -> str:
        """The one caption of the language model that sees no image."""
        return write_texts(self._model, self._tokenizer, None, [self._cfg.task.prompt], self._settings)[0][0].text

    @paddle.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss per token of one caption per image, with the image (eval_) and without (blind_eval_), and captions' scores.

        The choice of a caption follows from the seed and the image's place: it is the same at each call. A frozen language
        model's loss without images is so, too, and computed at the first one only. All ranks must call it.
        """
        cfg, run, model = self._cfg, self._run, self._model
        objective = Stage2Objective(model)
        target = "output_mask_BT" if model.language.is_encoder_decoder else "label_mask_BL"
        sums, rows = np.zeros(3), []
        collate = stage2_collate(cfg.task, self._tokenizer, eval_transform(cfg))
        share = Share(cfg, run, self._samples, collate, "validate", model=model)
        for places, batch in share:
            tensors = to_tensors(batch)
            query_BQD = self._encode(places, model.encoded(tensors))
            blind = float(objective.text_loss(None, tensors)) if self._blind is None else 0.0
            sums += int(batch[target].sum()) * np.array([float(objective.text_loss(query_BQD, tensors)), blind, 1.0])
            chosen = first(self._limit, places)
            if self._settings and chosen:
                query_NQD = query_BQD.index_select(paddle.to_tensor(chosen))
                rows += self._write([places[row] for row in chosen], query_NQD)
        seen, blind, tokens = np.sum(run.context.gather_objects(sums), axis=0).tolist()
        blind_loss = blind / tokens if self._blind is None else self._blind
        if getattr(model.language, "is_frozen", False):
            self._blind = blind_loss
        metrics = {"eval_loss": seen / tokens, "blind_eval_loss": blind_loss}
        return metrics | self._score(rows, share.found) if self._settings else metrics

    def _encode(self, places: Sequence[int], encoded_BPV: Tensor) -> Tensor:
        rows = {place: row for row, place in enumerate(places) if place in self._looked_at}
        with keep_shares(self._model.qformer, rows, self._shares):
            return self._model.soft_prompt(encoded_BPV)

    def _write(self, places: Sequence[int], query_NQD: Tensor) -> list[tuple[int, dict[str, Any]]]:
        prompts = [self._cfg.task.prompt] * len(places)
        written = write_texts(self._model, self._tokenizer, query_NQD, prompts, self._settings)
        return [
            (
                place,
                {
                    "image_id": self._samples[place].image_id,
                    "caption": texts[0].text,
                    "captions": [text.text for text in texts],
                    "score": texts[0].score,
                    **({"shares": self._shares.pop(place)} if place in self._shares else {}),
                },
            )
            for place, texts in zip(places, written, strict=True)
        ]

    def _score(self, rows: list[tuple[int, dict[str, Any]]], found: np.ndarray) -> dict[str, float]:
        captioned = found if self._limit is None else found[found < self._limit]
        self.rows = gather_rows(self._run.context, rows, captioned)
        if not self.rows:  # not one of the first images can be read
            return {}
        samples = [self._samples[place] for place in captioned]
        return validation_scores(self._run, samples, [row["caption"] for row in self.rows], self._names)
