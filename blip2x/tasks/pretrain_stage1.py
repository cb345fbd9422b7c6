"""Stage 1: the Q-Former learns to see what texts say, by contrast, matching and captioning (BLIP-2, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

from blip2x.config.run import RunConfig
from blip2x.data.collate import Stage1Collate
from blip2x.data.source import Split
from blip2x.engine.result import TaskResult
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.registry import TASKS
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.retrieval import Stage1Validation
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train


@TASKS.register("pretrain_stage1")
class PretrainStage1(Task):
    """Train the three losses; score contrast, matching and captions on the evaluation split."""

    makes: ClassVar[tuple[str, ...]] = ("model.weights",)

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Captions of both splits."""
        return [("captions", "train"), ("captions", "val")]

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """The image encoder, and a BERT or an earlier stage 1 to start from."""
        return ["model.vision.weights", "model.weights" if cfg.model.weights else "model.qformer.weights"]

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """What a validation gives of all images together; a data set with groups of images has the recalls of each as well."""
        return Stage1Validation.names(cfg.task)

    def run(self) -> TaskResult:
        """Train; recall in both directions, beside what chance gets, and the share of pairs that are told apart rightly."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, tokenizer = loader.stage1()
        evaluation = self.read(self.source.captions, "val")
        validation = Stage1Validation(self.cfg, self.run_folder, model, tokenizer, evaluation)
        last = train(
            self.cfg,
            self.run_folder,
            Stage1Objective(model, self.context, self.task, dec_id=tokenizer.dec_id),
            model,
            self.read(self.source.captions, "train"),
            Stage1Collate(train_transform(self.cfg), tokenizer, self.task.max_txt_len),
            tokenizers={"qformer": tokenizer},
            frozen_origin=loader.frozen_origin("vision"),
            evaluate=validation,
        )
        told = ("@1", "@5", "@10", "chance", "eval_itm_accuracy")
        metrics = {name: value for name, value in last.items() if name.endswith(told)}
        return TaskResult(metrics, {"model.weights": self.checkpoint_folder()})
