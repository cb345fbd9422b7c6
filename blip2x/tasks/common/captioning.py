"""What stage 2, captioning and answering share: collation, prompts, the loss on held-out images, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.config.task import CaptionConfig, PretrainStage2Config
from blip2x.data.collate import Collate, ImageCollate, Stage2Collate, Stage2EncoderDecoderCollate, Transform
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.evaluate import track
from blip2x.engine.run import Run
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.models.assemblies.stage2 import Stage2Model, join_prefix
from blip2x.models.qformer.captioner import QFormerCaptioner
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.tasks.common.loading import eval_loader, eval_transform, finish_evaluation


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


def write_texts(
    model: Stage2Model,
    tokenizer: TextTokenizer,
    query_BQD: Tensor | None,
    prompts: Sequence[str],
    settings: GenerationSettings,
) -> list[list[Text]]:
    """For each prompt the generated texts, best first; `query_BQD` None: the language model sees no image."""
    language = model.language
    # An encoder reads its text as in training, closed by the end token and without a gap behind the queries, which would shift
    # its relative positions; a decoder goes on where the prompt stops, and counts tokens only.
    side = "right" if language.is_encoder_decoder else "left"
    ids_BL, mask_BL = tokenizer.encode(prompts, max_length=None, padding_side=side, add_end=language.is_encoder_decoder)
    prefix = join_prefix(language, query_BQD, paddle.to_tensor(ids_BL), paddle.to_tensor(mask_BL))
    return _decode(language, prefix, tokenizer, settings)


def write_captions(
    model: Stage1Model, tokenizer: TextTokenizer, image_BCHW: Tensor, settings: GenerationSettings
) -> list[list[Text]]:
    """For each image the captions that the Q-Former of stage 1 writes alone, best first."""
    *_, cache = model.image_features(image_BCHW)
    return _decode(QFormerCaptioner(model.qformer, dec_id=tokenizer.dec_id), cache, tokenizer, settings)


def _decode(decoder: Any, prefix: Any, tokenizer: TextTokenizer, settings: GenerationSettings) -> list[list[Text]]:
    end_id, pad_id = tokenizer.end_id, tokenizer.pad_id
    out = generate(decoder, prefix, settings, eos_id=end_id, pad_id=pad_id, start_id=decoder.start_id)
    texts = [Text(tokenizer.decode(ids), float(score)) for ids, score in zip(out.ids, out.scores, strict=True)]
    each = settings.num_return_sequences
    return [texts[start : start + each] for start in range(0, len(texts), each)]


@paddle.no_grad()
def caption_loss(
    cfg: RunConfig, run: Run, model: Stage2Model, tokenizer: TextTokenizer, samples: Sequence[CaptionSample]
) -> dict[str, float]:
    """Loss of the evaluation captions with the image, and without it (the language model alone); means over batches."""
    loader = eval_loader(cfg, run, samples, stage2_collate(cfg.task, tokenizer, eval_transform(cfg)))
    objective = Stage2Objective(model)
    sums = np.zeros(3)
    for batch in track(run, loader, "evaluate", len(loader)):
        rows, tensors = len(batch["image_BCHW"]), to_tensors(batch)
        seen, blind = objective(tensors)["loss"], objective.text_loss(None, tensors)
        sums += [rows * float(seen), rows * float(blind), rows]
    finish_evaluation(run, loader, int(sums[-1]))
    seen, blind, count = np.sum(run.context.gather_objects(sums), axis=0).tolist()
    return {"eval_loss": seen / count, "blind_eval_loss": blind / count}


@paddle.no_grad()
def encoded_images(
    cfg: RunConfig,
    run: Run,
    encode: Callable[[Tensor], Any],
    samples: Sequence[CaptionSample | QuestionSample],
    description: str,
) -> Iterator[tuple[list[int], Any]]:
    """Go once over this rank's share of the images of `samples`, each encoded once: (image ids, what `encode` gives)."""
    images = list({sample.image_id: sample for sample in samples}.values())
    loader = eval_loader(cfg, run, images, ImageCollate(eval_transform(cfg)))
    seen = 0
    for batch in track(run, loader, description, len(loader)):
        yield batch["image_id_B"].tolist(), encode(to_tensors(batch)["image_BCHW"])
        seen += len(batch["image_id_B"])
    finish_evaluation(run, loader, seen)


def gather_rows(run: Run, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """All ranks' rows, each once, in the order of `key`.

    Raises:
        RuntimeError: a row came from two ranks.
    """
    merged = sorted((row for part in run.context.gather_objects(rows) for row in part), key=lambda row: row[key])
    if len({row[key] for row in merged}) != len(merged):
        raise RuntimeError(f"{len(merged)} rows came together from all ranks, some of them twice")
    return merged
