"""Stage 2: the queries learn to tell a frozen language model what an image shows (BLIP-2, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.source import Split
from blip2x.engine.result import TaskResult
from blip2x.metrics.caption import score_names
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.registry import TASKS
from blip2x.tasks.common.captioning import VALIDATION_METRICS, HeldOutCaptions, stage2_collate, validation_settings
from blip2x.tasks.common.inputs import require_captions
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train
from blip2x.tasks.common.weights import Start


@TASKS.register("pretrain_stage2")
class PretrainStage2(Task):
    """Train the caption's loss; its value on the evaluation split is the result."""

    makes: ClassVar[tuple[str, ...]] = ("model.weights",)

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Captions of both splits."""
        return [("captions", "train"), ("captions", "val")]

    @classmethod
    def starts_from(cls, cfg: RunConfig) -> Start:
        """A Q-Former that was trained in either stage."""
        return Start("qformer.", ("pretrain_stage1", "pretrain_stage2", "retrieval", "caption"))

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """All three parts; the Q-Former's come from stage 1 or an earlier stage 2."""
        return ["model.vision.weights", "model.language.weights", "model.weights"]

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[CaptionSample]) -> None:
        """A training is validated on true captions."""
        if split == "val":
            require_captions(cfg, split, samples, "a validation of task=pretrain_stage2")

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """The losses, and the captions' scores where they are written."""
        scores = score_names(VALIDATION_METRICS) if cfg.task.validation.captions else ()
        return {"eval_loss", "blind_eval_loss", *scores}

    def run(self) -> TaskResult:
        """Train; the loss per token on held-out images, beside that of the language model without the image."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, tokenizer = loader.stage2(new_projection=True)
        validation = self.task.validation
        held_out = HeldOutCaptions(
            self.cfg,
            self.run_folder,
            model,
            tokenizer,
            self.read(self.source.captions, "val"),
            settings=validation_settings(validation),
            limit=validation.max_images,
        )
        last = train(
            self.cfg,
            self.run_folder,
            Stage2Objective(model, self.context),
            model,
            self.read(self.source.captions, "train"),
            stage2_collate(self.task, tokenizer, train_transform(self.cfg)),
            tokenizers={"language": tokenizer},
            frozen_origin=loader.frozen_origin("vision", "language"),
            evaluate=held_out.validate,
        )
        metrics = {name: last[name] for name in ("eval_loss", "blind_eval_loss")}
        return TaskResult(metrics, {"model.weights": self.checkpoint_folder()})
