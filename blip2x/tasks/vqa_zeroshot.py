"""Answer questions about images without having been trained on any (BLIP-2, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from blip2x.config.run import RunConfig
from blip2x.data.samples import QuestionSample, has_truth
from blip2x.data.source import Split
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.lemmatise import require_lemmatiser
from blip2x.metrics.vqa import majority_answers
from blip2x.registry import TASKS
from blip2x.tasks.common.answering import Answering
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.results import answer_results, check_questions
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
        """As for all tasks, and the decoding options, the prompt and the lemmatiser."""
        GenerationSettings.from_config(cfg.task)
        if "{}" not in cfg.task.prompt:
            raise UserError(f"task.prompt={cfg.task.prompt!r} has no {{}}, where the question goes")
        if cfg.task.lemmatise:
            require_lemmatiser()
        super().check(cfg, promised)

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[QuestionSample]) -> None:
        """All questions have as many true answers as the rules want, or none."""
        check_questions(cfg, samples)

    def run(self) -> TaskResult:
        """Answer all questions; accuracy beside what is scored without the image and by the commonest answers."""
        model, tokenizer = ModelLoader.of_run(self.cfg, self.run_folder).stage2(new_projection=False)
        questions = self.read(self.source.questions, "eval")
        missing = len(self.source.skipped)
        answering = Answering(
            self.cfg,
            self.run_folder,
            model,
            tokenizer,
            questions,
            settings=GenerationSettings.from_config(self.task),
            prompt=self.task.prompt,
            encode=model.encode,
            queries=lambda feature_NQD, _: feature_NQD,
        )
        pairs = answering.answer()
        baselines = {"blind": answering.answer_blind()} if self.task.blind_baseline else {}

        def score() -> dict[str, float]:
            if self.task.blind_baseline and has_truth(questions):
                baselines.update(self._commonest(questions))
            return answer_results(
                self.run_folder,
                self.cfg,
                pairs,
                baselines=baselines,
                images_encoded=answering.images_encoded,
                left_out=missing + len(questions) - len(pairs),
            )

        return TaskResult(self.context.on_main(score))

    def _commonest(self, questions: Sequence[QuestionSample]) -> dict[str, dict[int, str]]:
        try:
            return {"majority": majority_answers(self.source.questions("train"), questions)}
        except UserError as error:
            self.console.print(f"note: no commonest answers to compare with: {error}", markup=False)
            return {}
