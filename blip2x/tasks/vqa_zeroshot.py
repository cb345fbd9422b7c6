"""Answer questions about images without having been trained on any (BLIP-2, section 4.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from blip2x.config.run import RunConfig
from blip2x.data.samples import QuestionSample
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.batches import to_tensors
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.vqa import answer_score, majority_answers, vqa_accuracy
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.registry import TASKS
from blip2x.tasks.common.captioning import write_texts
from blip2x.tasks.common.loading import Share
from blip2x.tasks.common.merge import gather_rows
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.pictures import save_pictures
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.weights import STAGE2, Start


@TASKS.register("vqa_zeroshot")
class VqaZeroshot(Task):
    """Each image is encoded once, however many questions are asked about it."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """The questions."""
        return [("questions", "eval")]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A model that went through stage 2."""
        return STAGE2

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """All three parts; the Q-Former's come from stage 2."""
        return ["model.vision.weights", "model.language.weights", "model.weights"]

    @classmethod
    def check(cls, cfg: RunConfig, promised: frozenset[str] = frozenset()) -> None:
        """As for all tasks, and the decoding options and the prompt."""
        GenerationSettings.from_config(cfg.task)
        if "{}" not in cfg.task.prompt:
            raise UserError(f"task.prompt={cfg.task.prompt!r} has no {{}}, where the question goes")
        super().check(cfg, promised)

    def run(self) -> TaskResult:
        """Answer all questions; accuracy beside what is scored without the image and by the commonest answers."""
        model, tokenizer = ModelLoader.of_run(self.cfg, self.run_folder).stage2(new_projection=False)
        questions = self.read(self.source.questions, "eval")
        rows = self._answer(model, tokenizer, questions)
        asked = {question.question_id: question for question in questions}
        pairs = [(asked[row["question_id"]], row) for row in rows]
        if self.task.blind_baseline:
            self._answer_blind(model, tokenizer, pairs)
        return TaskResult(self.context.on_main(lambda: self._score(pairs)))

    @paddle.no_grad()
    def _answer(self, model: Stage2Model, tokenizer: TextTokenizer, questions: list[QuestionSample]) -> list[dict[str, Any]]:
        settings, size = GenerationSettings.from_config(self.task), self.task.eval_batch_size
        asked: dict[int, list[tuple[int, QuestionSample]]] = {}
        for place, question in enumerate(questions):
            asked.setdefault(question.image_id, []).append((place, question))
        images = [of_image[0][1] for of_image in asked.values()]
        share, rows = Share.of_images(self.cfg, self.run_folder, images, "answer"), []
        for _, batch in share:
            query_BQD = model.encode(to_tensors(batch)["image_BCHW"])
            here = [(row, *pair) for row, image_id in enumerate(batch["image_id_B"].tolist()) for pair in asked[image_id]]
            for start in range(0, len(here), size):
                chunk = here[start : start + size]
                query_NQD = query_BQD.index_select(paddle.to_tensor([row for row, _, _ in chunk]))
                written = write_texts(model, tokenizer, query_NQD, [self._prompt(question) for *_, question in chunk], settings)
                rows += [
                    (place, {"question_id": question.question_id, "prediction": texts[0].text, "score": texts[0].score})
                    for (_, place, question), texts in zip(chunk, written, strict=True)
                ]
        seen = {images[place].image_id for place in share.found}
        answered = [place for place, question in enumerate(questions) if question.image_id in seen]
        return gather_rows(self.context, rows, np.array(answered))

    @paddle.no_grad()
    def _answer_blind(
        self, model: Stage2Model, tokenizer: TextTokenizer, pairs: list[tuple[QuestionSample, dict[str, Any]]]
    ) -> None:
        """Answer each different question once from its text alone."""
        settings, size = GenerationSettings.from_config(self.task), self.task.eval_batch_size
        prompts = sorted({self._prompt(question) for question, _ in pairs})
        answers = {}
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            written = write_texts(model, tokenizer, None, chunk, settings)
            answers |= {prompt: texts[0].text for prompt, texts in zip(chunk, written, strict=True)}
        for question, row in pairs:
            row["blind"] = answers[self._prompt(question)]

    def _prompt(self, question: QuestionSample) -> str:
        return self.task.prompt.replace("{}", question.question)

    def _score(self, pairs: list[tuple[QuestionSample, dict[str, Any]]]) -> dict[str, float]:
        questions = [question for question, _ in pairs]
        found = {"": {row["question_id"]: row["prediction"] for _, row in pairs}}
        if self.task.blind_baseline:
            found["blind_"] = {row["question_id"]: row["blind"] for _, row in pairs}
            try:
                found["majority_"] = majority_answers(self.source.questions("train"), questions)
            except UserError as error:
                self.console.print(f"note: no commonest answers to compare with: {error}", markup=False)
        metrics = {}
        for prefix, predictions in found.items():
            metrics |= _accuracies(prefix, predictions, questions)
        pictures = save_pictures(self.run_folder, questions)
        self.run_folder.write_lines(
            [
                {
                    "stage": self.run_folder.stage,
                    "image_id": question.image_id,
                    "group": question.group,
                    "image": pictures.get(question.image_id),
                    "name": question.image.name,
                    "question": question.question,
                    "question_type": question.question_type,
                    "answers": list(question.answers),
                    "correct": answer_score(row["prediction"], question.answers),
                    **row,
                }
                for question, row in pairs
            ],
            "predictions.jsonl",
        )
        return metrics


def _accuracies(prefix: str, predictions: dict[int, str], questions: list[QuestionSample]) -> dict[str, float]:
    """Of all questions, by type, and by group of images where there are several."""
    answers = {question.question_id: question.answers for question in questions}
    types = {question.question_id: question.question_type for question in questions}
    results = {f"{prefix}{name}": value for name, value in vqa_accuracy(predictions, answers, types).items()}
    groups = sorted({question.group for question in questions} - {""})
    for group in groups if len(groups) > 1 else []:
        ids = [question.question_id for question in questions if question.group == group]
        own = vqa_accuracy({i: predictions[i] for i in ids}, {i: answers[i] for i in ids})
        results[f"{group}/{prefix}accuracy"] = own["accuracy"]
    return results
