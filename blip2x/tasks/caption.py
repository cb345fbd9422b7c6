"""Caption images and score the captions; fine-tune on captions first where ``task.train`` is true."""

from __future__ import annotations

from collections.abc import Sequence

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample
from blip2x.data.sequences import left_out
from blip2x.data.source import Split
from blip2x.data.tokenize import TextTokenizer
from blip2x.engine.result import TaskResult
from blip2x.generation.settings import GenerationSettings
from blip2x.metrics.caption import score_names
from blip2x.models.assemblies.stage2 import Stage2Model
from blip2x.objectives.stage2 import Stage2Objective
from blip2x.registry import TASKS
from blip2x.tasks.common.captioning import HeldOutCaptions, stage2_collate
from blip2x.tasks.common.inputs import require_captions
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.results import caption_results
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train
from blip2x.tasks.common.weights import STAGE2, Start


@TASKS.register("caption")
class Caption(Task):
    """Each image is encoded once; captions go to predictions.jsonl, scores to the result."""

    @classmethod
    def reads(cls, cfg: RunConfig) -> list[tuple[str, Split | None]]:
        """Captions to score against, and to train on and choose by."""
        return [("captions", split) for split in (("eval", "train", "val") if cfg.task.train else ("eval",))]

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
        """A training is validated on true captions."""
        if split == "val":
            require_captions(cfg, split, samples, "a validation of task.train=true")

    @classmethod
    def validation_metrics(cls, cfg: RunConfig) -> set[str] | None:
        """The losses, and the captions' scores but for METEOR and SPICE, which take long to start."""
        return {"eval_loss", "blind_eval_loss", *score_names(_quick(cfg.task.metrics))}

    def run(self) -> TaskResult:
        """Train where asked for, then evaluate; where both are of the same images, the last validation's captions are kept."""
        loader = ModelLoader.of_run(self.cfg, self.run_folder)
        model, tokenizer = loader.stage2(new_projection=False)
        samples = self.read(self.source.captions, "eval")
        settings, names = GenerationSettings.from_config(self.task), _quick(self.task.metrics)

        def held_out_captions(samples: Sequence[CaptionSample]) -> HeldOutCaptions:
            return HeldOutCaptions(
                self.cfg, self.run_folder, model, tokenizer, samples, settings=settings, limit=None, names=names, looks=True
            )

        held_out, weights = held_out_captions(samples), {}
        if self.task.train:
            chosen_by = held_out if self.source.val_is_eval else held_out_captions(self.read(self.source.captions, "val"))
            self._train(loader, model, tokenizer, chosen_by)
            weights = {"model.weights": self.checkpoint_folder()}
        if not held_out.rows:
            held_out.caption()
        blind = held_out.caption_blind() if self.task.blind_baseline else None
        by_id = {sample.image_id: sample for sample in samples}
        pairs = [(by_id[row["image_id"]], row) for row in held_out.rows]
        missing = left_out(samples) + len(samples) - len(pairs)
        metrics = self.context.on_main(lambda: caption_results(self.run_folder, self.cfg, pairs, blind=blind, left_out=missing))
        return TaskResult(metrics, weights)

    def _train(self, loader: ModelLoader, model: Stage2Model, tokenizer: TextTokenizer, chosen_by: HeldOutCaptions) -> None:
        train(
            self.cfg,
            self.run_folder,
            Stage2Objective(model, self.context),
            model,
            self.read(self.source.captions, "train"),
            stage2_collate(self.task, tokenizer, train_transform(self.cfg)),
            tokenizers={"language": tokenizer},
            frozen_origin=loader.frozen_origin("vision", "language"),
            evaluate=chosen_by.validate,
        )


def _quick(metrics: list[str]) -> list[str]:
    return [name for name in metrics if name not in ("METEOR", "SPICE")]
