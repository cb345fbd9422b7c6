"""Answers to questions; what is made of an image is made once for all questions about it.

N questions, Q queries, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.data.samples import QuestionSample
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.run import Run
from blip2x.generation.settings import GenerationSettings
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.tasks.common.captioning import write_texts
from blip2x.tasks.common.loading import Share
from blip2x.tasks.common.merge import gather_rows


class Answering:
    """Answers `questions`.

    Attributes:
        images_encoded: by this rank so far.

    Args:
        cfg: the whole config.
        run: the task's run.
        model: in evaluation mode.
        tokenizer: the language model's.
        questions: the same on each rank.
        settings: how to decode.
        prompt: "{}" is replaced by the question.
        encode: image_BCHW -> what is kept of each image for its questions.
        queries: (that, a row per question; these questions) -> query_NQD.
        group: whether an image's questions share what `encode` gives.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run: Run,
        model: Stage2Model,
        tokenizer: TextTokenizer,
        questions: Sequence[QuestionSample],
        *,
        settings: GenerationSettings,
        prompt: str,
        encode: Callable[[Tensor], Tensor],
        queries: Callable[[Tensor, Sequence[QuestionSample]], Tensor],
        group: bool = True,
    ):
        self._cfg, self._run, self._model, self._tokenizer, self._questions = cfg, run, model, tokenizer, questions
        self._settings, self._prompt, self._encode, self._queries, self._group = settings, prompt, encode, queries, group
        self.images_encoded = 0

    @paddle.no_grad()
    def answer(self) -> list[tuple[QuestionSample, dict[str, Any]]]:
        """Each question whose image can be read, in order, with question_id, prediction and score. All ranks must call it."""
        asked: dict[int, list[int]] = {}
        for place, question in enumerate(self._questions):
            asked.setdefault(question.image_id if self._group else place, []).append(place)
        groups = list(asked.values())
        share = Share.of_images(self._cfg, self._run, [self._questions[group[0]] for group in groups], "answer")
        size, rows = self._cfg.task.eval_batch_size, []
        for numbers, batch in share:
            features = self._encode(to_tensors(batch)["image_BCHW"])
            self.images_encoded += len(numbers)
            here = [(row, place) for row, number in enumerate(numbers) for place in groups[number]]
            for start in range(0, len(here), size):
                rows += self._write(features, here[start : start + size])
        answered = sorted(place for number in share.found for place in groups[number])
        return gather_rows(self._run.context, rows, np.array(answered))

    def _write(self, features: Tensor, here: list[tuple[int, int]]) -> list[tuple[int, tuple[QuestionSample, dict[str, Any]]]]:
        questions = [self._questions[place] for _, place in here]
        query_NQD = self._queries(features.index_select(paddle.to_tensor([row for row, _ in here])), questions)
        prompts = [self._prompt.replace("{}", question.question) for question in questions]
        written = write_texts(self._model, self._tokenizer, query_NQD, prompts, self._settings)
        return [
            (
                place,
                (question, {"question_id": question.question_id, "prediction": texts[0].text, "score": texts[0].score}),
            )
            for (_, place), question, texts in zip(here, questions, written, strict=True)
        ]
