"""Caption images and score the captions; fine-tune on captions first where ``task.train`` is true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.result import TaskResult
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.caption import CaptionScores, score_names
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.registry import TASKS
from blip2x.tasks.common.captioning import HeldOutCaptions, score_captions, stage2_collate
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.pictures import save_pictures
from blip2x.tasks.common.results import (
    has_truth,
    interval_metrics,
    metric_key,
    split_by,
    tell_no_score,
    write_leaderboard,
)
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train
from blip2x.tasks.common.weights import STAGE2, Start

_MEANS = ("ROUGE_L", "CIDEr", "SPICE")  # whose value of a set of images is the mean over them; BLEU's and METEOR's are not


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

    @classmethod
    def check_samples(cls, cfg: RunConfig, split: Split | None, samples: Sequence[CaptionSample]) -> None:
        """All images to caption have true captions, or none has; a training is validated on them."""
        if split == "eval" and not has_truth(samples) and cfg.task.train:
            raise UserError(
                f"task.train=true is validated on the captions to evaluate on, and {cfg.dataset.name} has none; "
                "train on a data set that has some, and caption with task.train=false"
            )

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """The losses, and the captions' scores but for METEOR, which takes long to start."""
        return {"eval_loss", "blind_eval_loss", *score_names(_quick(cfg.task.metrics))}

    def run(self) -> TaskResult:
        """Train where asked for, then evaluate; the last validation's captions are those of the trained model."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, tokenizer = loader.stage2(new_projection=False)
        samples = self.read(self.source.captions, "eval")
        missing = len(self.source.skipped)
        settings, names = GenerationSettings.from_config(self.task), _quick(self.task.metrics)
        held_out = HeldOutCaptions(
            self.cfg, self.run_folder, model, tokenizer, samples, settings=settings, limit=None, names=names
        )
        weights = {}
        if self.task.train:
            self._train(loader, model, tokenizer, held_out)
            weights = {"model.weights": self.checkpoint_folder()}
        if not held_out.rows:
            held_out.caption()
        blind = held_out.caption_blind() if self.task.blind_baseline else None
        by_id = {sample.image_id: sample for sample in samples}
        pairs = [(by_id[row["image_id"]], row) for row in held_out.rows]
        left_out = missing + len(samples) - len(pairs)
        return TaskResult(self.context.on_main(lambda: self._score(pairs, blind, left_out)), weights)

    def _train(self, loader: ModelLoader, model: Stage2Model, tokenizer: TextTokenizer, held_out: HeldOutCaptions) -> None:
        train(
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

    def _score(self, pairs: list[tuple[CaptionSample, dict[str, Any]]], blind: str | None, left_out: int) -> dict[str, float]:
        """Scores of the whole set, and of each group of images as a set of its own, as NoCaps' domains are evaluated.

        Within a group all is computed from its images alone: CIDEr's weight of a phrase comes from its rarity among them.
        """
        samples, scores, metrics = [sample for sample, _ in pairs], CaptionScores(), {}
        if has_truth(samples):
            captions = {sample.image_id: row["caption"] for sample, row in pairs}
            scores, metrics = self._scores_of(samples, captions, blind, self.task.metrics)
            names = [name for name in self.task.metrics if name not in scores.failures]  # told once is enough
            for group, own in split_by(samples, lambda sample: sample.group).items():
                metrics |= self._scores_of(own, captions, blind, names, scope=group)[1]
        else:
            tell_no_score(self.run_folder, self.source.name, samples)
        metrics["images"] = len(pairs)
        pictures = save_pictures(self.run_folder, samples)
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
        said = [{"image_id": sample.image_id, "caption": row["caption"]} for sample, row in pairs]
        write_leaderboard(self.run_folder, self.cfg, said, left_out=left_out)
        return metrics

    def _scores_of(
        self, samples: list[CaptionSample], captions: dict[int, str], blind: str | None, names: Sequence[str], scope: str = ""
    ) -> tuple[CaptionScores, dict[str, float]]:
        """Scores of these images' captions, and the same as metrics with intervals and with the blind caption's beside."""
        references = {sample.image_id: sample.captions for sample in samples}
        scores = score_captions(self.run_folder, {image_id: captions[image_id] for image_id in references}, references, names)
        metrics = {metric_key(name, scope=scope): value for name, value in scores.scores.items()}
        for name in [name for name in _MEANS if name in scores.per_image]:
            values = scores.per_image[name]
            metrics |= interval_metrics(name, list(values.values()), list(values), scope=scope)
        if blind is not None:
            without = score_captions(self.run_folder, dict.fromkeys(references, blind), references, names)
            metrics |= {metric_key(f"blind_{name}", scope=scope): value for name, value in without.scores.items()}
        return scores, metrics


def _quick(metrics: list[str]) -> list[str]:
    return [name for name in metrics if name != "METEOR"]
