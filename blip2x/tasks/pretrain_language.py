"""Fit a language model on the data set's text alone: in the demo, the reader that stage 2 freezes."""

from __future__ import annotations

import math
from typing import ClassVar

from blip2x.config.run import RunConfig
from blip2x.data.collate import LanguageCollate, LanguageEncoderDecoderCollate
from blip2x.data.source import Split
from blip2x.engine.result import TaskResult
from blip2x.objectives.language import LanguageObjective
from blip2x.registry import TASKS
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train


@TASKS.register("pretrain_language")
class PretrainLanguage(Task):
    """Next-token prediction on ``source.texts()``; no image is ever opened."""

    makes: ClassVar[tuple[str, ...]] = ("model.language.weights",)

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """The texts."""
        return [("texts", None)]

    @classmethod
    def weight_keys(cls, cfg: RunConfig) -> list[str]:
        """A language model to go on from, where one is given."""
        return ["model.language.weights"]

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """None: a data set has no texts but those to train on."""
        return None

    def run(self) -> TaskResult:
        """Train; the last training loss is the result."""
        language, tokenizer = ModelLoader.of_run(self.cfg, self.run_folder).language()
        collate = LanguageEncoderDecoderCollate if language.is_encoder_decoder else LanguageCollate
        last = train(
            self.cfg,
            self.run_folder,
            LanguageObjective(language, self.context),
            language,
            self.read(self.source.texts),
            collate(tokenizer, self.task.max_txt_len),
            tokenizers={"language": tokenizer},
            frozen_origin={},
        )
        loss = last["loss"]
        metrics = {"loss": loss, "perplexity": math.exp(loss)}
        return TaskResult(metrics, {"model.language.weights": self.checkpoint_folder()})
