"""Answer questions about images without having been trained on any (BLIP-2, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from blip2x.config.run import RunConfig
from blip2x.data.samples import QuestionSample, has_truth
from blip2x.data.source import Split
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.vqa import majority_answers
from blip2x.registry import TASKS
from blip2x.tasks.common.answering import Answering, AnsweringTask
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.weights import STAGE2, Start


@TASKS.register("vqa_zeroshot")
class VqaZeroshot(AnsweringTask):
    """Each image is encoded once, however many questions are asked about it."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """The questions."""
        return [("questions", "eval")]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A model that went through stage 2."""
        return STAGE2

    def run(self) -> TaskResult:
        """Answer all questions; accuracy beside what is scored without the image and by the commonest answers."""
        model, tokenizer = ModelLoader.of_run(self.cfg, self.run_folder).stage2(new_projection=False)
        questions = self.read(self.source.questions, "eval")
        answering = Answering(
            self.cfg,
            self.run_folder,
            model,
            tokenizer,
            questions,
            settings=GenerationSettings.from_config(self.task),
            prompt=self.task.prompt,
            encode=model.soft_prompt,
        )

        def baselines() -> dict[str, dict[int, str]]:
            if not self.task.blind_baseline:
                return {}
            blind = {"blind": answering.answer_blind()}
            commonest = self.context.on_main(lambda: self._commonest(questions)) if has_truth(questions) else {}
            return {**blind, **commonest}

        return TaskResult(self.results(answering, questions, baselines))

    def _commonest(self, questions: Sequence[QuestionSample]) -> dict[str, dict[int, str]]:
        try:
            return {"majority": majority_answers(self.source.questions("train"), questions)}
        except UserError as error:
            self.console.print(f"note: no commonest answers to compare with: {error}", markup=False)
            return {}
