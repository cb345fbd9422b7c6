"""Answering questions about images, whatever turns an image and a question into queries.

B images, N questions about them, Q queries, D width of the language model; C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.data.samples import QuestionSample
from blip2x.data.sequences import left_out
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer, clean_question
from blip2x.engine.batches import to_tensors
from blip2x.engine.run import Run
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.lemmatise import require_lemmatiser
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.models.prefix import SharedQueries
from blip2x.models.qformer.qformer import rows_of
from blip2x.tasks.common.attention import draw_looks, keep_shares
from blip2x.tasks.common.captioning import write_about, write_texts
from blip2x.tasks.common.loading import Share
from blip2x.tasks.common.merge import gather_rows
from blip2x.tasks.common.results import answer_results, check_questions
from blip2x.tasks.common.task import Task


class AnsweringTask(Task):
    """What the tasks that answer questions share: their parts, their checks and their scores."""

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """All three parts; the Q-Former's come from stage 2."""
        return ["model.vision.weights", "model.language.weights", "model.weights"]

    @classmethod
    def check(cls, cfg: RunConfig, promised: Set[str] = frozenset()) -> None:
        """As for all tasks, and the decoding options and the lemmatiser."""
        GenerationSettings.from_config(cfg.task)
        if cfg.task.lemmatise:
            require_lemmatiser()
        super().check(cfg, promised)

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[QuestionSample]) -> None:
        """All questions have as many true answers as the rules want, or none."""
        check_questions(cfg, samples)

    def results(
        self,
        answering: Answering,
        questions: Sequence[QuestionSample],
        baselines: Callable[[], dict[str, dict[int, str]]] = dict,
    ) -> dict[str, float]:
        """Answer `questions`, which are those of `answering`, and score the answers. All ranks must call it.

        Args:
            answering: has not answered yet.
            questions: all of them, the same on each rank.
            baselines: see `answer_results`; all ranks call it when the answers are there.
        """
        pairs = answering.answer()
        others = baselines()
        missing = left_out(questions) + len(questions) - len(pairs)
        return self.context.on_main(
            lambda: answer_results(
                self.run_folder,
                self.cfg,
                pairs,
                baselines=others,
                images_encoded=answering.images_encoded,
                left_out=missing,
            )
        )


def asked(prompt: str, question: QuestionSample, *, clean: bool) -> str:
    """What the language model reads behind the queries: `prompt` with the question in place of "{}"."""
    return prompt.replace("{}", clean_question(question.question) if clean else question.question)


def by_image(questions: Sequence[QuestionSample]) -> list[list[int]]:
    """Places of the questions about each image, in the order in which the images first occur."""
    units: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        units.setdefault(question.image_id, []).append(place)
    return list(units.values())


class Answering:
    """Answers all questions, sharing the images among the ranks; questions about one image share its encoding.

    Attributes:
        images_encoded: images that were encoded, or whose features are kept, on all ranks together, once `answer` is done.

    Args:
        cfg: the whole config.
        run: the task's run.
        model: in evaluation mode when a method is called; its language model writes.
        tokenizer: the language model's.
        questions: all of them, the same on each rank.
        settings: how to decode.
        prompt: what the language model reads behind the queries; "{}" is replaced by the question, cleaned if the task says so.
        encode: what the image encoder gives [B, P, V] -> features [B, ...], called once per image; or `QFormer.look`'s.
        queries: the features of each question's image [N, ...] and the N questions -> query_NQD. None: features are queries
            already, whatever is asked, and the language model reads those of an image once for all questions about it.
        group: false: encode an image anew for each question about it.
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
        queries: Callable[[Tensor, Sequence[QuestionSample]], Tensor] | None = None,
        group: bool = True,
    ):
        self.images_encoded = 0
        self._cfg, self._run, self._model, self._tokenizer, self._questions = cfg, run, model, tokenizer, questions
        self._settings, self._prompt, self._encode, self._queries = settings, prompt, encode, queries
        # places of the questions that share a pass through the encoder
        self._units = by_image(questions) if group else [[place] for place in range(len(questions))]
        self._looked_at = draw_looks([places[0] for places in self._units])  # each an image's first question
        self._shares: dict[int, np.ndarray] = {}  # place -> where the queries looked

    @paddle.no_grad()
    def answer(self) -> list[tuple[QuestionSample, dict[str, Any]]]:
        """Each question whose image can be read, in their order, with its question_id, prediction and score (log-probability).

        The first questions about a few images come with shares [Q, 1 + P], see `watch_queries`. All ranks must call it; each
        gets all answers. The first question's prompt goes to the terminal.
        """
        run = self._run
        run.console.print(f"prompt: {self._asked(self._questions[0])!r}", markup=False, highlight=False, soft_wrap=True)
        images = [self._questions[places[0]] for places in self._units]
        share, rows, encoded = Share.of_images(self._cfg, run, images, "answer", self._model), [], 0
        for units, batch in share:
            first = {self._units[unit][0]: row for row, unit in enumerate(units)}
            with self._looking(first):
                feature_B = self._encode(self._model.encoded(to_tensors(batch)))
            encoded += len(units)
            rows += self._write(feature_B, [(row, place) for row, unit in enumerate(units) for place in self._units[unit]])
        self.images_encoded = sum(run.context.gather_objects(encoded))
        expected = np.sort([place for unit in share.found for place in self._units[unit]])
        answers = gather_rows(run.context, rows, expected)
        return [(self._questions[place], answer) for place, answer in zip(expected, answers, strict=True)]

    @paddle.no_grad()
    def answer_blind(self) -> dict[int, str]:
        """Question id -> the answer of the language model that sees no image; each different prompt is answered once.

        All ranks must call it: they share the batches, which do not depend on how many ranks there are.
        """
        prompts = sorted({self._asked(question) for question in self._questions}, key=lambda prompt: (len(prompt), prompt))
        size, context, own = self._cfg.task.eval_batch_size, self._run.context, {}
        for start in range(size * context.data_rank, len(prompts), size * context.data_size):
            chunk = prompts[start : start + size]
            written = write_texts(self._model, self._tokenizer, None, chunk, self._settings)
            own |= {prompt: texts[0].text for prompt, texts in zip(chunk, written, strict=True)}
        answers = {prompt: text for part in context.gather_objects(own) for prompt, text in part.items()}
        return {question.question_id: answers[self._asked(question)] for question in self._questions}

    def _asked(self, question: QuestionSample) -> str:
        return asked(self._prompt, question, clean=self._cfg.task.clean_questions)

    def _looking(self, rows: Mapping[int, int]) -> AbstractContextManager[None]:
        """Keep where the queries look, if they do so inside, for the places of `rows` (-> row) that were drawn."""
        wanted = {place: row for place, row in rows.items() if place in self._looked_at}
        return keep_shares(self._model.qformer, wanted, self._shares)

    def _write(self, feature_B: Tensor, asked: Sequence[tuple[int, int]]) -> list[tuple[int, dict[str, Any]]]:
        """Answer the questions given by (row of the batch, place among the questions), `task.eval_batch_size` at a time.

        Those of about one length together, so that little is read that is padding only.
        """
        size, rows, model = self._cfg.task.eval_batch_size, [], self._model
        shared = None
        if self._queries is None:  # with one question per image there is nothing to share
            several = len(asked) > feature_B.shape[0]
            shared = model.language.share(feature_B) if several else SharedQueries(feature_B, None)
        prompted = [(self._asked(self._questions[place]), row, place) for row, place in asked]
        by_length = sorted(prompted, key=lambda entry: len(entry[0]))
        for start in range(0, len(by_length), size):
            prompts, images, places = zip(*by_length[start : start + size], strict=True)
            questions = [self._questions[place] for place in places]
            if shared is not None:
                written = write_about(model, self._tokenizer, shared, images, prompts, self._settings)
            else:
                with self._looking({place: row for row, place in enumerate(places)}):
                    query_NQD = self._queries(rows_of(feature_B, paddle.to_tensor(images)), questions)
                written = write_texts(model, self._tokenizer, query_NQD, prompts, self._settings)
            rows += [
                (
                    place,
                    {
                        "question_id": question.question_id,
                        "prediction": texts[0].text,
                        "score": texts[0].score,
                        **({"shares": self._shares.pop(place)} if place in self._shares else {}),
                    },
                )
                for place, question, texts in zip(places, questions, written, strict=True)
            ]
        return rows
