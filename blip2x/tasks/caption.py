"""Caption images and score the captions; fine-tune on captions first where ``task.train`` is true."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.result import TaskResult
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.caption import CaptionScores, caption_scores
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.registry import TASKS
from blip2x.tasks.common.captioning import caption_loss, encoded_images, gather_rows, stage2_collate, write_texts
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.pictures import save_pictures
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train
from blip2x.tasks.common.weights import STAGE2, Start


@TASKS.register("caption")
class Caption(Task):
    """Each image is encoded once; captions go to predictions.jsonl, scores to the result."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Captions to score against, and to train on."""
        return [("captions", "eval"), *([("captions", "train")] if cfg.task.train else [])]

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
        """As for all tasks, and the decoding options."""
        GenerationSettings.from_config(cfg.task)
        super().check(cfg, promised)

    def run(self) -> TaskResult:
        """Train where asked for, then evaluate."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, tokenizer = loader.stage2(new_projection=False)
        weights = {}
        if self.task.train:
            self._train(loader, model, tokenizer)
            weights = {"model.weights": self.checkpoint_folder()}
        return TaskResult(self._evaluate(model, tokenizer), weights)

    def _train(self, loader: ModelLoader, model: Stage2Model, tokenizer: TextTokenizer) -> None:
        evaluation = self.read(self.source.captions, "eval")
        train(
            self.cfg,
            self.run_folder,
            Stage2Objective(model),
            model,
            self.read(self.source.captions, "train"),
            stage2_collate(self.task, tokenizer, train_transform(self.cfg)),
            tokenizers={"language": tokenizer},
            frozen_origin=loader.frozen_origin("vision", "language"),
            evaluate=lambda: caption_loss(self.cfg, self.run_folder, model, tokenizer, evaluation),
        )

    @paddle.no_grad()
    def _evaluate(self, model: Stage2Model, tokenizer: TextTokenizer) -> dict[str, float]:
        settings = GenerationSettings.from_config(self.task)
        samples = {sample.image_id: sample for sample in self.read(self.source.captions, "eval")}
        rows = []
        for ids, query_BQD in encoded_images(self.cfg, self.run_folder, model.encode, list(samples.values()), "caption"):
            written = write_texts(model, tokenizer, query_BQD, [self.task.prompt] * len(ids), settings)
            rows += [
                {"image_id": image_id, "caption": texts[0].text, "captions": [t.text for t in texts], "score": texts[0].score}
                for image_id, texts in zip(ids, written, strict=True)
            ]
        rows = gather_rows(self.run_folder, rows, "image_id")
        blind = (
            write_texts(model, tokenizer, None, [self.task.prompt], settings)[0][0].text if self.task.blind_baseline else None
        )
        return self.context.on_main(lambda: self._score([(samples[row["image_id"]], row) for row in rows], blind))

    def _score(self, pairs: list[tuple[CaptionSample, dict[str, Any]]], blind: str | None) -> dict[str, float]:
        references = {sample.image_id: sample.captions for sample, _ in pairs}
        scores = self._scores({sample.image_id: row["caption"] for sample, row in pairs}, references)
        metrics = dict(scores.scores)
        without = self._scores(dict.fromkeys(references, blind), references) if blind is not None else CaptionScores()
        metrics |= {f"blind_{name}": value for name, value in without.scores.items()}
        metrics |= _group_means(pairs, scores, without)
        pictures = save_pictures(self.run_folder, [sample for sample, _ in pairs])
        self.run_folder.write_lines(
            [
                {
                    "stage": self.run_folder.stage,
                    "group": sample.group,
                    "image": pictures.get(sample.image_id),
                    "name": sample.image.name,
                    **row,
                    "references": list(sample.captions),
                    "blind": blind,
                    "scores": {name: values[sample.image_id] for name, values in scores.per_image.items()},
                }
                for sample, row in pairs
            ],
            "predictions.jsonl",
        )
        return metrics

    def _scores(self, predictions: dict[int, str], references: dict[int, tuple[str, ...]]) -> CaptionScores:
        scores = caption_scores(predictions, references, self.task.metrics)
        for name, reason in scores.failures.items():
            self.console.print(f"warning: {name} could not be computed: {reason}", style="yellow", markup=False)
        return scores


def _group_means(
    pairs: list[tuple[CaptionSample, dict[str, Any]]], scores: CaptionScores, without: CaptionScores
) -> dict[str, float]:
    """CIDEr per group: the mean over its images; n-grams are weighed by their rarity among all images."""
    groups = sorted({sample.group for sample, _ in pairs} - {""})
    results = {}
    for group in groups if len(groups) > 1 else []:
        members = [sample.image_id for sample, _ in pairs if sample.group == group]
        for prefix, found in (("", scores), ("blind_", without)):
            if "CIDEr" in found.per_image:
                values = found.per_image["CIDEr"]
                results[f"{group}/{prefix}CIDEr"] = float(np.mean([values[image_id] for image_id in members]))
    return results
