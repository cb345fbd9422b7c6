"""Stage 1: the Q-Former learns to see what texts say, by contrast, matching and captioning (BLIP-2, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.source import Split
from blip2x.engine.result import TaskResult
from blip2x.registry import TASKS
from blip2x.tasks.common.inputs import require_captions
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.retrieval import Stage1Validation
from blip2x.tasks.common.stage1_training import train_stage1
from blip2x.tasks.common.task import Task


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
    def promises(cls, cfg: RunConfig) -> set[str]:
        """Stage 2 leaves out what reads texts in the Q-Former; who needs it again has it from here."""
        return {*super().promises(cfg), "model.qformer.weights"}

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[CaptionSample]) -> None:
        """A training is validated on true captions."""
        if split == "val":
            require_captions(cfg, split, samples, "a validation of task=pretrain_stage1")

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """What a validation gives of all images together; a data set with groups of images has the recalls of each as well."""
        return Stage1Validation.names(cfg.task)

    def run(self) -> TaskResult:
        """Train; recall in both directions, beside what chance gets, and the share of pairs that are told apart rightly."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        last = train_stage1(self, loader, *loader.stage1())
        told = ("@1", "@5", "@10", "chance", "eval_itm_accuracy")
        metrics = {name: value for name, value in last.items() if name.endswith(told)}
        return TaskResult(metrics, dict.fromkeys(("model.weights", "model.qformer.weights"), self.checkpoint_folder()))
