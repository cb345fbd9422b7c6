"""Scenes of one to three real handwritten digits, with captions, questions and patch labels made from their composition.

Two things are kept from training: a share of the handwritten images, by which all evaluation scenes are painted, and some
digit-colour combinations, which only the evaluation scenes of the group ``held_out`` contain.
"""

from __future__ import annotations

import random
from functools import cached_property

import numpy as np

from blip2x.config.dataset import DigitsConfig
from blip2x.data.samples import CaptionSample, LabelledImage, QuestionSample
from blip2x.data.scenes import words
from blip2x.data.scenes.handwriting import DIGITS, load_handwriting, split_sources
from blip2x.data.scenes.painter import PALETTE, Painter, SceneImage
from blip2x.data.scenes.scene import Scene, SceneLottery, held_out_combinations
from blip2x.data.source import Source, Split
from blip2x.errors import UserError
from blip2x.registry import DATASETS

_HELD_OUT_EVERY = 4  # one evaluation scene in four has a held-out combination
_REDRAWS = 50  # evaluation scenes differ in what they show while there are enough combinations


@DATASETS.register("digits")
class Digits(Source):
    """All of it follows from `cfg.seed`; scenes are drawn on first use and painted when opened."""

    def __init__(self, cfg: DigitsConfig):
        _check(cfg)
        self.cfg = cfg
        self.name = cfg.name
        self.skipped = []
        self.held_out = held_out_combinations(cfg.colours, count=cfg.held_out_combinations, seed=cfg.seed)
        handwriting = load_handwriting()
        self.train_sources, self.eval_sources = split_sources(handwriting.digits, eval_share=cfg.held_out_digits, seed=cfg.seed)
        self.painter = Painter(handwriting.ink, grid=cfg.grid, cell=cfg.cell)

    @cached_property
    def train_scenes(self) -> list[Scene]:
        """Scenes without any held-out combination or image."""
        lottery = self._lottery("train")
        return [lottery.draw_where(self.held_out, wanted=False) for _ in range(self.cfg.train_scenes)]

    @cached_property
    def eval_scenes(self) -> list[Scene]:
        """Scenes of held-out images; each fourth has a held-out combination."""
        lottery = self._lottery("eval")
        shown: set[frozenset] = set()
        scenes = []
        for index in range(self.cfg.test_scenes):
            wanted = bool(self.held_out) and index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
            for _ in range(_REDRAWS):
                scene = lottery.draw_where(self.held_out, wanted=wanted)
                if scene.combinations not in shown:
                    break
            shown.add(scene.combinations)
            scenes.append(scene)
        return scenes[: self.cfg.eval_limit]

    def captions(self, split: Split) -> list[CaptionSample]:
        """One sample per scene, up to `captions_per_image` captions each."""
        return [
            CaptionSample(
                image=self._image(split, index, scene),
                captions=words.captions(scene, self.cfg.captions_per_image, self._rng("captions", split, index)),
                image_id=self._image_id(split, index),
                group=self._group(scene),
            )
            for index, scene in enumerate(self._scenes(split))
        ]

    def questions(self, split: Split) -> list[QuestionSample]:
        """Up to `questions_per_image` per scene, of as many types as possible."""
        samples: list[QuestionSample] = []
        for index, scene in enumerate(self._scenes(split)):
            image = self._image(split, index, scene)
            for asked in words.questions(scene, self.cfg.questions_per_image, self._rng("questions", split, index)):
                samples.append(
                    QuestionSample(
                        question_id=len(samples),
                        image=image,
                        question=asked.question,
                        answers=(asked.answer,),
                        question_type=asked.question_type,
                        answer_type=asked.answer_type,
                        image_id=self._image_id(split, index),
                        group=self._group(scene),
                    )
                )
        return samples

    def texts(self) -> list[str]:
        """One document per train scene: captions of it, then questions with their answers, a line each."""
        return [
            words.document(
                scene,
                max_captions=self.cfg.captions_per_document,
                max_questions=self.cfg.questions_per_document,
                rng=self._rng("texts", "train", index),
            )
            for index, scene in enumerate(self.train_scenes)
        ]

    def labels(self, split: Split, *, patches_per_side: int) -> list[LabelledImage]:
        """Per patch `digit` (0: none, else digit + 1) and `colour` (0: none, else its place in `cfg.colours` + 1)."""
        if patches_per_side % self.cfg.grid:
            raise UserError(
                f"{patches_per_side} x {patches_per_side} patches do not align with dataset.grid={self.cfg.grid}: "
                f"model.vision.image_size / patch_size must be a multiple of {self.cfg.grid}"
            )
        patch = np.ones((patches_per_side // self.cfg.grid,) * 2, dtype=np.int64)
        samples = []
        for index, scene in enumerate(self._scenes(split)):
            digit, colour = np.zeros((2, self.cfg.grid, self.cfg.grid), dtype=np.int64)
            for placed in scene.digits:
                digit[placed.row, placed.column] = placed.digit + 1
                colour[placed.row, placed.column] = self.cfg.colours.index(placed.colour) + 1
            labels = {"digit": np.kron(digit, patch).ravel(), "colour": np.kron(colour, patch).ravel()}
            samples.append(LabelledImage(self._image(split, index, scene), labels))
        return samples

    @property
    def label_classes(self) -> dict[str, int]:
        """Ten digits and the colours, and "none" of each."""
        return {"digit": len(DIGITS) + 1, "colour": len(self.cfg.colours) + 1}

    def _scenes(self, split: Split) -> list[Scene]:
        return self.train_scenes if split == "train" else self.eval_scenes

    def _lottery(self, split: Split) -> SceneLottery:
        return SceneLottery(
            sources=self.train_sources if split == "train" else self.eval_sources,
            colours=self.cfg.colours,
            grid=self.cfg.grid,
            max_digits=self.cfg.max_digits,
            seed=f"{self.cfg.seed}/scenes/{split}",
        )

    def _image(self, split: Split, index: int, scene: Scene) -> SceneImage:
        return SceneImage(scene, self.painter, name=f"{self.name}/{split}/{index:06d}")

    def _image_id(self, split: Split, index: int) -> int:
        return index if split == "train" else self.cfg.train_scenes + index

    def _group(self, scene: Scene) -> str:
        return "held_out" if scene.combinations & self.held_out else "seen"

    def _rng(self, purpose: str, split: Split, index: int) -> random.Random:
        drawn = "train" if split == "train" else "eval"  # val's scenes are eval's, and so are their texts
        return random.Random(f"{self.cfg.seed}/{purpose}/{drawn}/{index}")


def _check(cfg: DigitsConfig) -> None:
    """Raise `UserError` where the scenes asked for cannot be made."""
    counts = [f"{what}_per_{where}" for what in ("captions", "questions") for where in ("image", "document")]
    for key in ("train_scenes", "test_scenes", "grid", *counts):
        if getattr(cfg, key) < 1:
            raise UserError(f"dataset.{key} must be at least 1, got {getattr(cfg, key)}")
    if cfg.cell < 8:
        raise UserError(f"dataset.cell must be at least 8 pixels, the size of the handwritten digits, got {cfg.cell}")
    unknown = [colour for colour in cfg.colours if colour not in PALETTE]
    if unknown or len(set(cfg.colours)) < len(cfg.colours):
        raise UserError(f"dataset.colours must be different ones of {', '.join(PALETTE)}; got {', '.join(cfg.colours)}")
    most = min(len(words.NUMBERS) - 1, len(cfg.colours), cfg.grid**2)
    if not 1 <= cfg.max_digits <= most:
        raise UserError(f"dataset.max_digits must be 1 to {most} with this grid and these colours, got {cfg.max_digits}")
    if not 0 <= cfg.held_out_combinations <= 10 * (len(cfg.colours) - 1):
        raise UserError(
            f"dataset.held_out_combinations must be 0 to {10 * (len(cfg.colours) - 1)}, so that every digit and every colour "
            f"stays in training, got {cfg.held_out_combinations}"
        )
    if cfg.eval_limit is not None and cfg.eval_limit < 1:
        raise UserError(f"dataset.eval_limit must be at least 1 or null, got {cfg.eval_limit}")
    if not 0 < cfg.held_out_digits < 1:
        raise UserError(f"dataset.held_out_digits is a share of the images between 0 and 1, got {cfg.held_out_digits}")
