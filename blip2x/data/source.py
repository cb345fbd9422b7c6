"""What a data set offers; a source overrides the methods that it can serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from blip2x.data.samples import CaptionSample, LabelledImage, QuestionSample
from blip2x.errors import UserError

Split = Literal["train", "val", "eval"]  # val: what trainings choose by; the same as eval where a data set has none


class Source:
    """A data set; whatever it lacks is answered with a `UserError` that says so.

    Attributes:
        name: the option's name, for messages and reports.
        skipped: a sentence per image that was left out because the config says so; empty for sources without files.
    """

    name: str
    skipped: list[str]

    @property
    def val_is_eval(self) -> bool:
        """Whether trainings choose by the same samples as evaluations report."""
        return True

    def captions(self, split: Split) -> Sequence[CaptionSample]:
        """One sample per image, with all its captions."""
        raise self.lacks(f"captions for {split}")

    def questions(self, split: Split) -> Sequence[QuestionSample]:
        """One sample per question."""
        raise self.lacks(f"questions for {split}")

    def texts(self) -> Sequence[str]:
        """Documents of lines for the language model and for training tokenizers; from the train split only."""
        raise self.lacks("texts for a language model")

    def labels(self, split: Split, *, patches_per_side: int) -> list[LabelledImage]:
        """Class numbers per patch of a square image of `patches_per_side` x `patches_per_side` patches."""
        raise self.lacks("patch labels")

    @property
    def label_classes(self) -> Mapping[str, int]:
        """Label name -> number of classes, class 0 ("nothing here") included."""
        raise self.lacks("patch labels")

    def lacks(self, what: str, *, key: str | None = None) -> UserError:
        """The error to raise where `what` is asked for and is not there; `key` is the config key that would give it."""
        return UserError(f"data set {self.name!r} has no {what}; {f'set {key}' if key else 'choose another data set or task'}")
