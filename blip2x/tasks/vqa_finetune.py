"""Answer questions that the Q-Former reads, too; fine-tune on questions first where ``task.train`` is true (section 4.3).

N questions, K their tokens in the Q-Former, P patches, V their width, Q queries, D width of the language model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from paddle import Tensor

from blip2x.config.run import RunConfig
from blip2x.data.collate import QuestionCollate, QuestionTexts
from blip2x.data.samples import QuestionSample, has_truth
from blip2x.data.sequences import Samples
from blip2x.data.source import Split
from blip2x.engine.batches import to_tensors
from blip2x.engine.result import TaskResult
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.lemmatise import lemmatise
from blip2x.metrics.vqa import answer_scores
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.models.qformer.qformer import ImageCache
from blip2x.objectives.answering import AnsweringObjective
from blip2x.registry import TASKS
from blip2x.tasks.common.answering import Answering, AnsweringTask
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.pictures import EXAMPLES, opened
from blip2x.tasks.common.train import train
from blip2x.tasks.common.weights import Start


@TASKS.register("vqa_finetune")
class VqaFinetune(AnsweringTask):
    """Each image goes through the image encoder once for all its questions, through the Q-Former once per question."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Questions to be evaluated on, and to train on and validate on."""
        return [("questions", "eval"), *([("questions", "train"), ("questions", "val")] if cfg.task.train else [])]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A model that went through stage 2, or through this task."""
        tasks = ("pretrain_stage2", "caption", "vqa_finetune") if cfg.task.train else ("vqa_finetune",)
        return Start("language_proj.", tasks, takes_questions=True)

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """All three parts; what reads texts in the Q-Former comes from stage 1, where `model.weights` lacks it."""
        return [*super().weight_keys(cfg), "model.qformer.weights"]

    @classmethod
    def check(cls, cfg: RunConfig, promised: Set[str] = frozenset()) -> None:
        """As for all tasks that answer, and whether something reads texts in the Q-Former."""
        super().check(cfg, promised)
        weights = cls.weights(cfg, promised)
        if not cfg.task.train and "model.weights" not in promised and not weights.reads_questions:
            raise UserError(
                f"task.train=false evaluates a model that was fine-tuned on questions, but model.weights={weights.whole} has "
                "no Q-Former that reads them; set model.weights to a checkpoint of vqa_finetune, or task.train=true"
            )
        if "model.qformer.weights" not in promised:
            weights.texts_part()

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[QuestionSample]) -> None:
        """All questions have true answers, as many as the rules want, or none has; those to train on have some."""
        if split == "train":
            if not has_truth(samples):
                raise UserError(
                    f"the questions of {cfg.dataset.name} to train on have no answers; train on a split that has some"
                )
            return
        super().check_samples(cfg, split, samples)
        if split == "val" and cfg.task.keep_best and not has_truth(samples):
            raise UserError(
                f"task.keep_best={cfg.task.keep_best}: no question to validate on has a known answer, so no checkpoint is "
                "the best; set task.keep_best=0"
            )

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """The losses per token of the answers, and their accuracy."""
        return {"eval_loss", "blind_eval_loss", "accuracy"}

    def run(self) -> TaskResult:
        """Train where asked for, then answer the evaluation questions; accuracy where their true answers are known."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, question_tokenizer, tokenizer = loader.answering()
        texts = QuestionTexts(
            question_tokenizer, tokenizer, self.task.prompt, self.task.max_txt_len, clean=self.task.clean_questions
        )
        weights = {}
        if self.task.train:
            self._train(loader, model, texts)
            weights = {"model.weights": self.checkpoint_folder()}
        questions = self.read(self.source.questions, "eval")
        answering = HeldOutQuestions(self.cfg, self.run_folder, model, texts, questions).answering()
        return TaskResult(self.results(answering, questions), weights)

    def _train(self, loader: ModelLoader, model: Stage2Model, texts: QuestionTexts) -> None:
        held_out = HeldOutQuestions(self.cfg, self.run_folder, model, texts, self.read(self.source.questions, "val"))
        train(
            self.cfg,
            self.run_folder,
            AnsweringObjective(model, self.context),
            model,
            self.read(self.source.questions, "train"),
            QuestionCollate(train_transform(self.cfg), texts),
            tokenizers={"qformer": texts.qformer, "language": texts.language},
            frozen_origin=loader.frozen_origin("vision", "language"),
            evaluate=held_out.validate if held_out.has_answers else None,
        )


class HeldOutQuestions:
    """Answers to held-out questions, and the loss of their true answers; each image is encoded once for both.

    Args:
        cfg: the whole config.
        run: the task's run.
        model: one whose Q-Former reads questions, in evaluation mode when a method is called.
        texts: of the model's tokenizers.
        questions: the same on each rank.
    """

    def __init__(self, cfg: RunConfig, run: Run, model: Stage2Model, texts: QuestionTexts, questions: Sequence[QuestionSample]):
        self._cfg, self._run, self._model, self._texts, self._questions = cfg, run, model, texts, questions
        self._objective = AnsweringObjective(model)
        self._blind: float | None = None

    @property
    def has_answers(self) -> bool:
        """Whether the true answers are known."""
        return has_truth(self._questions)

    @cached_property
    def _first(self) -> Sequence[QuestionSample]:
        """About the first images."""
        limit = self._cfg.task.validation.max_images
        if isinstance(self._questions, Samples):
            return self._questions.first_images(limit)
        first = set(list(dict.fromkeys(question.image_id for question in self._questions))[:limit])
        return [question for question in self._questions if question.image_id in first]

    def answering(self) -> Answering:
        """What answers all questions."""
        return self._answering(self._questions, GenerationSettings.from_config(self._cfg.task), self._queries)

    def validate(self) -> dict[str, float]:
        """Of the first images: the answers' accuracy, and the loss per token of the true answer that most annotators gave.

        It is given with the image (eval_loss) and without (blind_eval_loss). A frozen language model's loss without images is
        the same at each call, and computed at the first one only. All ranks must call it.
        """
        validation, sums = self._cfg.task.validation, np.zeros(3)

        def queries(image: ImageCache, questions: Sequence[QuestionSample]) -> Tensor:
            query_NQD = self._queries(image, questions)
            sums[:] += self._losses(query_NQD, questions)
            return query_NQD

        settings = GenerationSettings.from_config(self._cfg.task)
        settings = replace(settings, num_beams=validation.num_beams, num_return_sequences=1)
        pairs = self._answering(self._first, settings, queries).answer()
        seen, blind, tokens = np.sum(self._run.context.gather_objects(sums), axis=0).tolist()
        blind_loss = blind / tokens if self._blind is None else self._blind
        if getattr(self._model.language, "is_frozen", False):
            self._blind = blind_loss
        accuracy = self._run.context.on_main(lambda: self._accuracy(pairs))
        return {"eval_loss": seen / tokens, "blind_eval_loss": blind_loss, "accuracy": accuracy}

    def _accuracy(self, pairs: Sequence[tuple[QuestionSample, dict[str, Any]]]) -> float:
        """In per cent, by the rules that the evaluation has, too."""
        task, written = self._cfg.task, [row["prediction"] for _, row in pairs]
        ids = [question.question_id for question, _ in pairs]
        predictions = dict(zip(ids, lemmatise(written) if task.lemmatise else written, strict=True))
        truth = {question.question_id: question.answers for question, _ in pairs}
        scores = answer_scores(predictions, truth, task.answer_rules.value)
        self._run.show_examples(
            lambda: [
                {
                    "image": opened(question.image),
                    "question": question.question,
                    "prediction": predictions[question.question_id],
                    "answers": question.answers,
                    "correct": scores[question.question_id],
                }
                for question, _ in pairs[:EXAMPLES]
            ]
        )
        return 100 * sum(scores.values()) / len(scores)

    def _answering(
        self,
        questions: Sequence[QuestionSample],
        settings: GenerationSettings,
        queries: Callable[[ImageCache, Sequence[QuestionSample]], Tensor],
    ) -> Answering:
        prompt, tokenizer = self._cfg.task.prompt, self._texts.language
        return Answering(
            self._cfg, self._run, self._model, tokenizer, questions,
            settings=settings, prompt=prompt, encode=self._looked_at, queries=queries,
        )  # fmt: skip

    def _looked_at(self, encoded_BPV: Tensor) -> ImageCache:
        """What all questions about an image share."""
        return self._model.qformer.look(self._model.ln_vision(encoded_BPV))

    def _queries(self, image: ImageCache, questions: Sequence[QuestionSample]) -> Tensor:
        asked = to_tensors(self._texts.asked([question.question for question in questions]))
        return self._model.encode_asked(image, asked["question_ids_BK"], asked["question_mask_BK"])

    def _losses(self, query_NQD: Tensor, questions: Sequence[QuestionSample]) -> np.ndarray:
        """Sums over the answers' tokens of the loss with the image and without (0 where that is known), and their number."""
        answers = [Counter(question.answers).most_common(1)[0][0] for question in questions]
        texts = self._texts.answered([question.question for question in questions], answers)
        target = "output_mask_BT" if self._model.language.is_encoder_decoder else "label_mask_BL"
        batch = to_tensors(texts)
        seen = float(self._objective.text_loss(query_NQD, batch))
        blind = float(self._objective.text_loss(None, batch)) if self._blind is None else 0.0
        return int(texts[target].sum()) * np.array([seen, blind, 1.0])
