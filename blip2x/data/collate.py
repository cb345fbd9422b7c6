"""From samples to batches of NumPy arrays, one class per objective.

A collate has two steps, so that a bad picture costs one sample and not its batch: ``load(sample, rng)`` opens one sample and
makes its random choices, ``collate(items)`` stacks what was loaded.

Shapes: B samples, C channels, H height, W width, K tokens of a question, L tokens, T output tokens, P patches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from blip2x.data.feature_rows import LoadedRow, stack_images
from blip2x.data.samples import CaptionSample, LabelledImage, Picture, QuestionSample
from blip2x.data.tokenize import TextTokenizer, clean_question
from blip2x.errors import UserError

Batch = dict[str, np.ndarray]


class Transform(Protocol):
    """From a picture to [3, size, size] float32, see `blip2x.data.transforms`, or to what stands for it."""

    def load(self, picture: Picture, rng: random.Random) -> np.ndarray | LoadedRow:
        """Open, crop and normalise; raises `UserError` where that is impossible."""


class Collate(Protocol):
    """What `build_loader` needs."""

    def load(self, sample: Any, rng: random.Random) -> Any:
        """Open one sample; raises `UserError` where that is impossible."""

    def __call__(self, items: list[Any]) -> Batch:
        """Stack at least one loaded sample."""


@dataclass(frozen=True)
class LoadedCaption:
    """A picture with the caption chosen for it in this epoch."""

    image: np.ndarray | LoadedRow  # as the transform gives it
    image_id: int
    caption: str


@dataclass(frozen=True)
class ImageCollate:
    """Pictures alone, to encode each once: image_BCHW, image_id_B."""

    transform: Transform

    def load(self, sample: CaptionSample | QuestionSample, rng: random.Random) -> tuple[np.ndarray | LoadedRow, int]:
        """Open the picture."""
        return self.transform.load(sample.image, rng), sample.image_id

    def __call__(self, items: list[tuple[np.ndarray | LoadedRow, int]]) -> Batch:
        """Stack."""
        return {**stack_images([image for image, _ in items]), "image_id_B": _int64([i for _, i in items])}


@dataclass(frozen=True)
class VisionCollate:
    """Pictures and patch labels: image_BCHW, label_<name>_BP."""

    transform: Transform

    def load(self, sample: LabelledImage, rng: random.Random) -> tuple[np.ndarray, LabelledImage]:
        """Open the picture."""
        return self.transform.load(sample.image, rng), sample

    def __call__(self, items: list[tuple[np.ndarray, LabelledImage]]) -> Batch:
        """Stack."""
        labels = {f"label_{name}_BP": np.stack([sample.labels[name] for _, sample in items]) for name in items[0][1].labels}
        return {"image_BCHW": np.stack([image for image, _ in items]), **labels}


@dataclass(frozen=True)
class CaptionLoading:
    """Opens the picture and chooses one of its captions."""

    transform: Transform
    tokenizer: TextTokenizer
    max_txt_len: int  # tokens, bos and end included

    def load(self, sample: CaptionSample, rng: random.Random) -> LoadedCaption:
        """Open the picture; `rng` chooses its crop and its caption."""
        return LoadedCaption(self.transform.load(sample.image, rng), sample.image_id, rng.choice(sample.captions))


@dataclass(frozen=True)
class Stage1Collate(CaptionLoading):
    """Stage 1: image_BCHW, image_id_B, text_ids_BL, text_mask_BL, target_place_N.

    The places are those of the tokens to predict, in B * (L - 1): of each but the first, [CLS], and padding. They are found
    here because their number is a tensor's length, for which a device would have to be waited for.
    """

    def __call__(self, items: list[LoadedCaption]) -> Batch:
        """Stack and tokenize."""
        ids_BL, mask_BL = self.tokenizer.encode([i.caption for i in items], max_length=self.max_txt_len)
        return {
            **_images(items),
            "image_id_B": _int64([item.image_id for item in items]),
            "text_ids_BL": ids_BL,
            "text_mask_BL": mask_BL,
            "target_place_N": np.flatnonzero(mask_BL[:, 1:]),
        }


@dataclass(frozen=True)
class Stage2Collate(CaptionLoading):
    """Stage 2 with a decoder-only model: image_BCHW, text_ids_BL, text_mask_BL, label_mask_BL, target_place_N.

    A text is bos, prompt, caption, end. label_mask_BL is 1 at the tokens to be predicted: the caption and the end. bos comes
    after the queries on its own accord and is no target (LAVIS predicts it where there is no prompt). target_place_N are the
    targets' places in B * L, see `Stage1Collate`.
    """

    prompt: str

    def __post_init__(self):
        if self._given() + 2 > self.max_txt_len:  # a word and the end
            raise UserError(
                f"task.max_txt_len={self.max_txt_len} leaves no room for a caption after the prompt {self.prompt!r}, which "
                f"takes {self._given()} tokens"
            )

    def __call__(self, items: list[LoadedCaption]) -> Batch:
        """Stack and tokenize."""
        texts = [f"{self.prompt.strip()} {item.caption.strip()}" for item in items]
        ids_BL, mask_BL = self.tokenizer.encode(texts, max_length=self.max_txt_len)
        label_mask_BL = mask_BL.copy()
        label_mask_BL[:, : self._given()] = 0
        return {**_images(items), **_read_on(ids_BL, mask_BL, label_mask_BL)}

    def _given(self) -> int:
        """Tokens before the caption: bos and the prompt."""
        return 1 + len(self.tokenizer.tokens(self.prompt))


@dataclass(frozen=True)
class Stage2EncoderDecoderCollate(CaptionLoading):
    """Stage 2 with an encoder-decoder: image_BCHW, and what `_in_and_out` gives.

    The encoder reads the prompt; with `prefix_split` also the first words of the caption, how many is drawn by lot, and the
    decoder is asked for the rest (section 3.3 of the paper).
    """

    prompt: str
    prefix_split: bool

    def load(self, sample: CaptionSample, rng: random.Random) -> tuple[LoadedCaption, int]:
        """Open the picture, choose a caption and the number of words that the encoder gets."""
        item = super().load(sample, rng)
        words = len(item.caption.split())
        return item, rng.randrange(words) if self.prefix_split and words else 0

    def __call__(self, items: list[tuple[LoadedCaption, int]]) -> Batch:
        """Stack and tokenize."""
        words = [(item.caption.split(), cut) for item, cut in items]
        inputs = [" ".join([self.prompt.strip(), *first[:cut]]) for first, cut in words]
        outputs = [" ".join(rest[cut:]) for rest, cut in words]
        return {**_images([item for item, _ in items]), **_in_and_out(self.tokenizer, inputs, outputs, self.max_txt_len)}


@dataclass(frozen=True)
class LanguageCollate:
    """Documents for a decoder-only model: text_ids_BL, text_mask_BL, target_place_N; each is closed by the end token.

    The targets are all tokens but a document's first; their places are in B * L.

    bos stands before one of the document's lines, drawn by lot: as in a corpus that is packed into one stream and cut
    anywhere, and so that the model meets bos behind something that it has to heed, as it does in stage 2.
    """

    tokenizer: TextTokenizer
    max_txt_len: int

    def load(self, sample: str, rng: random.Random) -> str:
        """Put bos into the document; each line keeps its line break, the end token, also before bos."""
        lines = sample.splitlines()
        start = rng.randrange(len(lines))
        return "\n".join([*lines[:start], self.tokenizer.bos + lines[start], *lines[start + 1 :]])

    def __call__(self, items: list[str]) -> Batch:
        """Tokenize."""
        ids_BL, mask_BL = self.tokenizer.encode(items, max_length=self.max_txt_len, add_bos=False)
        targets_BL = mask_BL.copy()
        targets_BL[:, :1] = 0
        return {"text_ids_BL": ids_BL, "text_mask_BL": mask_BL, "target_place_N": np.flatnonzero(targets_BL)}


@dataclass(frozen=True)
class LanguageEncoderDecoderCollate:
    """Documents for an encoder-decoder: what `_in_and_out` gives.

    One line of the document is cut: the encoder reads all that stands before the cut, the decoder writes the rest of the line.
    A line with a question is cut after its last colon ("... short answer:"), so that the model answers and never asks, as
    FlanT5 does; other lines are cut at their start half of the time, else anywhere.
    """

    tokenizer: TextTokenizer
    max_txt_len: int

    def load(self, sample: str, rng: random.Random) -> tuple[str, str]:
        """Cut the document."""
        lines = [line.split() for line in sample.splitlines() if line.strip()]
        index = rng.randrange(len(lines))
        line = lines[index]
        colons = [place + 1 for place, word in enumerate(line[:-1]) if word.endswith(":")]
        asks = "?" in " ".join(line) and colons
        cut = colons[-1] if asks else rng.choice([0, rng.randrange(len(line))])
        before = [" ".join(words) for words in lines[:index]]
        return "\n".join([*before, " ".join(line[:cut])]), " ".join(line[cut:])

    def __call__(self, items: list[tuple[str, str]]) -> Batch:
        """Tokenize."""
        inputs, outputs = zip(*items, strict=True)
        return _in_and_out(self.tokenizer, inputs, outputs, self.max_txt_len)


def _read_on(ids_BL: np.ndarray, mask_BL: np.ndarray, label_mask_BL: np.ndarray) -> Batch:
    """Texts of a decoder-only model, and the places of its targets."""
    return {
        "text_ids_BL": ids_BL,
        "text_mask_BL": mask_BL,
        "label_mask_BL": label_mask_BL,
        "target_place_N": np.flatnonzero(label_mask_BL),
    }


def _in_and_out(tokenizer: TextTokenizer, inputs: list[str], outputs: list[str], max_length: int) -> Batch:
    """input_ids_BL, input_mask_BL, output_ids_BT, output_mask_BT, and target_place_N, the output's places in B * T."""
    input_ids_BL, input_mask_BL = tokenizer.encode(inputs, max_length=max_length)
    output_ids_BT, output_mask_BT = tokenizer.encode(outputs, max_length=max_length)
    return {
        "input_ids_BL": input_ids_BL,
        "input_mask_BL": input_mask_BL,
        "output_ids_BT": output_ids_BT,
        "output_mask_BT": output_mask_BT,
        "target_place_N": np.flatnonzero(output_mask_BT),
    }


def _images(items: list[LoadedCaption]) -> Batch:
    return stack_images([item.image for item in items])


def _int64(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


@dataclass(frozen=True)
class QuestionTexts:
    """What a model that is fine-tuned on questions reads and writes.

    The Q-Former reads the question: question_ids_BK, question_mask_BK. The language model is asked `prompt`, in which the
    question stands in place of "{}". A decoder-only one goes on with the answer: text_ids_BL, text_mask_BL, and label_mask_BL,
    1 at the answer and the end. An encoder-decoder reads the prompt, input_ids_BL and input_mask_BL, and writes the answer:
    output_ids_BT, output_mask_BT. target_place_N are the places of what is to be predicted, in B * L or B * T. Where prompt
    and answer are too long, it is the question that loses its last words.
    """

    qformer: TextTokenizer
    language: TextTokenizer
    prompt: str
    max_txt_len: int  # tokens of the question, and of prompt and answer, with what begins and ends them
    clean: bool  # questions, see `clean_question`

    def __post_init__(self):
        given = len(self.language.tokens(self.prompt.replace("{}", "")))
        if given + 4 > self.max_txt_len:  # bos, a word of the question, one of the answer, the end
            raise UserError(
                f"task.max_txt_len={self.max_txt_len} leaves no room for a question and an answer in the prompt "
                f"{self.prompt!r}, which takes {given} tokens"
            )

    def asked(self, questions: Sequence[str]) -> Batch:
        """For the Q-Former."""
        ids_BK, mask_BK = self.qformer.encode([self._question(text) for text in questions], max_length=self.max_txt_len)
        return {"question_ids_BK": ids_BK, "question_mask_BK": mask_BK}

    def answered(self, questions: Sequence[str], answers: Sequence[str]) -> Batch:
        """For the language model."""
        answers = [answer.strip() for answer in answers]
        prompts = [self._prompt(question, answer) for question, answer in zip(questions, answers, strict=True)]
        if self.language.family == "t5":
            return _in_and_out(self.language, prompts, answers, self.max_txt_len)
        texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        ids_BL, mask_BL = self.language.encode(texts, max_length=self.max_txt_len)
        label_mask_BL = mask_BL.copy()
        for row, prompt in zip(label_mask_BL, prompts, strict=True):
            row[: 1 + len(self.language.tokens(prompt))] = 0
        return _read_on(ids_BL, mask_BL, label_mask_BL)

    def _question(self, text: str) -> str:
        return clean_question(text) if self.clean else text

    def _prompt(self, question: str, answer: str) -> str:
        """With as much of the question as leaves the answer, or a word of a long one, its room."""
        written = "" if self.language.family == "t5" else answer
        words = self._question(question).split()
        while True:
            prompt = self.prompt.replace("{}", " ".join(words)).strip()
            if len(self.language.tokens(f"{prompt} {written}")) + 2 <= self.max_txt_len or not words:
                return prompt
            words.pop()


@dataclass(frozen=True)
class QuestionCollate:
    """Pictures with a question and an answer each: image_BCHW, and what `QuestionTexts` has."""

    transform: Transform
    texts: QuestionTexts

    def load(self, sample: QuestionSample, rng: random.Random) -> tuple[np.ndarray | LoadedRow, str, str]:
        """Open the picture and choose an answer: each as often as annotators gave it."""
        return self.transform.load(sample.image, rng), sample.question, rng.choice(sample.answers)

    def __call__(self, items: list[tuple[np.ndarray | LoadedRow, str, str]]) -> Batch:
        """Stack and tokenize."""
        images, questions, answers = zip(*items, strict=True)
        return {**stack_images(images), **self.texts.asked(questions), **self.texts.answered(questions, answers)}
