"""Your own pictures: annotation files beside an image folder.

Captions: a JSON list, or JSONL, of {"image": path below the folder, "caption": text or list of texts, "image_id": optional}.
Questions: {"image", "question", "answer": text or list of texts, "question_id", "question_type", "answer_type": optional}.
"""

from __future__ import annotations

from pathlib import Path

from blip2x.config.dataset import CustomConfig
from blip2x.data.image_text import ImageTextFolder
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.source import Source, Split, documents, first_images
from blip2x.registry import DATASETS


@DATASETS.register("custom")
class Custom(Source):
    """Files are read and checked, images for presence, when a method asks for them."""

    def __init__(self, cfg: CustomConfig):
        self.cfg = cfg
        self.name = cfg.name
        self.folder = ImageTextFolder(Path(cfg.images), cfg.on_bad_image, cfg.max_pixels)
        self.skipped = self.folder.skipped

    def captions(self, split: Split) -> list[CaptionSample]:
        """One sample per image; training captions are cleaned as BLIP does, evaluation captions stay as they are."""
        path = self.cfg.train_captions if split == "train" else self.cfg.eval_captions
        if path is None:
            raise self.lacks(f"captions for {split}", key=f"dataset.{split}_captions")
        samples = self.folder.captions(path, clean=split == "train")
        return samples if split == "train" else first_images(samples, self.cfg.eval_limit)

    def questions(self, split: Split) -> list[QuestionSample]:
        """The evaluation questions."""
        if split == "train":
            raise self.lacks("questions for train")
        if self.cfg.eval_questions is None:
            raise self.lacks("questions for eval", key="dataset.eval_questions")
        return first_images(self.folder.questions(self.cfg.eval_questions), self.cfg.eval_limit)

    def texts(self) -> list[str]:
        """One document per training image: its captions, a line each."""
        return documents(self.captions("train"))
