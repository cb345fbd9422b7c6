"""Training by stage 1's losses, as pre-training and as fine-tuning for retrieval do it."""

from __future__ import annotations

from blip2x.data.collate import Stage1Collate
from blip2x.data.tokenize import TextTokenizer
from blip2x.models.assemblies.stage1 import Stage1Model
from blip2x.objectives.stage1 import Stage1Objective
from blip2x.tasks.common.loading import train_transform
from blip2x.tasks.common.models import ModelLoader
from blip2x.tasks.common.retrieval import Stage1Validation
from blip2x.tasks.common.task import Task
from blip2x.tasks.common.train import train


def train_stage1(task: Task, loader: ModelLoader, model: Stage1Model, tokenizer: TextTokenizer) -> dict[str, float]:
    """Train `model` on the captions of `task`'s data set and validate it on those of val; the last metrics.

    Args:
        task: its config has stage 1's settings.
        loader: of `model` and its tokenizer.
        model: in evaluation mode.
        tokenizer: the Q-Former's.
    """
    evaluation = task.read(task.source.captions, "val")
    return train(
        task.cfg,
        task.run_folder,
        Stage1Objective(model, task.context, task.task, dec_id=tokenizer.dec_id),
        model,
        task.read(task.source.captions, "train"),
        Stage1Collate(train_transform(task.cfg), tokenizer, task.task.max_txt_len),
        tokenizers={"qformer": tokenizer},
        frozen_origin=loader.frozen_origin("vision"),
        evaluate=Stage1Validation(task.cfg, task.run_folder, model, tokenizer, evaluation),
    )
