"""Fit an image encoder on labels of its patches: in the demo, the eye that later stages freeze."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import paddle

from blip2x.config.run import RunConfig
from blip2x.data.collate import VisionCollate
from blip2x.engine.batches import to_tensors
from blip2x.engine.result import TaskResult
from blip2x.models.assemblies.patch_classifier import PatchClassifier
from blip2x.objectives.vision import VisionObjective
from blip2x.registry import TASKS, VISION_ENCODERS
from blip2x.tasks.common.inputs import build_source
from blip2x.tasks.common.loading import Share, eval_transform, train_transform
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train


@TASKS.register("pretrain_vision")
class PretrainVision(Task):
    """Which digit and which colour, or nothing, is on each patch; scored on held-out images."""

    makes: ClassVar[tuple[str, ...]] = ("model.vision.weights",)

    @classmethod
    def check(cls, cfg: RunConfig, promised: frozenset[str] = frozenset()) -> None:
        """As for all tasks; the labels depend on the number of patches."""
        super().check(cfg, promised)
        source = build_source(cfg)
        for split in ("train", "eval"):
            source.labels(split, patches_per_side=patches_per_side(cfg))

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """One accuracy per kind of label."""
        return {f"eval_{name}_accuracy" for name in build_source(cfg).label_classes}

    def run(self) -> TaskResult:
        """Train; accuracies on the patches of the evaluation split that show something."""
        cfg = self.cfg
        model = PatchClassifier(VISION_ENCODERS.get(cfg.model.vision.kind)(cfg.model.vision), self.source.label_classes)
        last = train(
            cfg,
            self.run_folder,
            VisionObjective(model),
            model,
            self.source.labels("train", patches_per_side=patches_per_side(cfg)),
            VisionCollate(train_transform(cfg)),
            tokenizers={},
            frozen_origin={},
            evaluate=lambda: self._evaluate(model),
        )
        held_out = self.validation_metrics(cfg)
        metrics = {name.removeprefix("eval_"): value for name, value in last.items() if name in held_out}
        return TaskResult(metrics, {"model.vision.weights": self.checkpoint_folder()})

    @paddle.no_grad()
    def _evaluate(self, model: PatchClassifier) -> dict[str, float]:
        samples = self.source.labels("eval", patches_per_side=patches_per_side(self.cfg))
        share = Share(self.cfg, self.run_folder, samples, VisionCollate(eval_transform(self.cfg)), "evaluate")
        right = {name: [0, 0] for name in self.source.label_classes}  # right ones and all, of the patches with something
        for _, batch in share:
            for name, logits_BPC in model(to_tensors(batch)["image_BCHW"]).items():
                label_BP = batch[f"label_{name}_BP"]
                shown = label_BP > 0
                right[name][0] += int((logits_BPC.argmax(axis=-1).numpy() == label_BP)[shown].sum())
                right[name][1] += int(shown.sum())
        totals = np.sum([[right[name] for name in right] for right in self.context.gather_objects(right)], axis=0)
        return {f"eval_{name}_accuracy": hits / total for name, (hits, total) in zip(right, totals.tolist(), strict=True)}


def patches_per_side(cfg: RunConfig) -> int:
    """Patches along one side of the image."""
    return cfg.model.vision.image_size // cfg.model.vision.patch_size
