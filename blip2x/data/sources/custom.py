"""Your own pictures: annotation files beside an image folder.

Captions: a JSON list, or JSONL, of {"image": path below the folder, "caption": text or list of texts, "image_id": optional}.
Questions: {"image", "question", "answer": text or list of texts, "question_id", "question_type", "answer_type": optional}.
"""

from __future__ import annotations

from dataclasses import fields

from blip2x.config.dataset import AnnotationFiles, CustomConfig, DatasetConfig, ImageTextConfig, ImageTextPart
from blip2x.data.image_text import image_folder
from blip2x.data.source import Split
from blip2x.data.sources.image_text import ImageText
from blip2x.registry import DATASETS


@DATASETS.register("custom")
class Custom(ImageText):
    """One part whose files are keys of their own, which is less to type."""

    def __init__(self, cfg: CustomConfig):
        image_folder(cfg.images)
        splits = {
            "train": AnnotationFiles(captions=cfg.train_captions, questions=cfg.train_questions),
            "val": AnnotationFiles(
                captions=cfg.val_captions or cfg.eval_captions, questions=cfg.val_questions or cfg.eval_questions
            ),
            "eval": AnnotationFiles(captions=cfg.eval_captions, questions=cfg.eval_questions),
        }
        shared = {field.name: getattr(cfg, field.name) for field in fields(DatasetConfig) if field.name != "kind"}
        super().__init__(
            ImageTextConfig(
                **shared,
                parts={cfg.name: ImageTextPart(images=cfg.images, splits=splits)},
                train_split="train",
                val_split="val",
                eval_split="eval",
                annotation_cache=cfg.annotation_cache,
            )
        )

    def _key(self, split: Split, name: str, sort: str) -> str:
        return f"dataset.{split}_{sort}"
