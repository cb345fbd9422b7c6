"""What is measured, in which sizes, and how: read by both sides, so it needs neither paddle nor torch."""

from __future__ import annotations

from dataclasses import dataclass

OURS = ("ours", "recomputed")  # the ways that blip2x goes; Hugging Face's and LAVIS's are gone in PyTorch
CAPTION_WORDS = (5, 12)  # the fewest and the most
NAMES = {"ours": "blip2x", "recomputed": "blip2x, recomputing", "hf": "Hugging Face", "lavis": "LAVIS's way"}


@dataclass(frozen=True)
class Row:
    """One comparison; the first way is what the others are divided by."""

    title: str
    unit: str  # of what `Sizes.count` counts
    ways: dict[str, str]  # way -> what it does
    answer: str  # texts | numbers: what is compared of the results; "": nothing


@dataclass(frozen=True)
class Sizes:
    """How much one run of a row does."""

    captions: int  # images that are captioned
    asked: int  # images that questions are asked about
    questions: int  # about all of them together; as many at a time as `batch`
    batch: int  # pairs of a training step; questions and pairs of a pass
    judged: int  # images that are matched
    candidates: int  # texts that each is matched with
    inputs: int  # images and texts of the parts alone
    text_tokens: int = 32

    @property
    def images(self) -> int:
        """How many pictures are made."""
        return max(self.captions, self.asked, self.batch, self.judged, self.inputs)

    def count(self, row: str) -> int:
        """How many units one run of `row` makes."""
        counts = {"caption": self.captions, "vqa": self.questions, "load": 1, "rerank": self.judged * self.candidates}
        counts |= dict.fromkeys(("stage1", "stage1_features", "stage2"), self.batch)
        return counts.get(row, self.inputs)


_TINY = Sizes(captions=4, asked=3, questions=16, batch=4, judged=2, candidates=6, inputs=4, text_tokens=16)
SIZES = {
    "small": Sizes(captions=8, asked=6, questions=32, batch=16, judged=4, candidates=16, inputs=8),
    "tiny_opt": _TINY,
    "tiny_t5": _TINY,
}

_LAVIS_STAGE1 = (
    "one pass for contrast and for the keys and values that captions read, a draw of a negative for each row with `.item()`, "
    "matching in one batch three times as large"
)
_FORWARD = "the same"

ROWS = {
    "caption": Row(
        "captions, 5 beams",
        "image",
        {
            "ours": "`task=caption` from the pictures' files to texts",
            "hf": "`Blip2ForConditionalGeneration.generate` behind Pillow and NumPy; LAVIS's way, too",
        },
        "texts",
    ),
    "vqa": Row(
        "answers, 5 beams, 5.3 questions about an image",
        "question",
        {
            "ours": "`task=vqa_zeroshot` from the pictures' files to texts; an image goes through the encoder once",
            "hf": "`generate` in batches of questions, each with its image, as LAVIS's evaluation does it",
        },
        "texts",
    ),
    "stage1": Row(
        "training step of stage 1, with the frozen image encoder",
        "pair",
        {"ours": "`Stage1Objective` and its optimizer", "lavis": _LAVIS_STAGE1},
        "numbers",
    ),
    "stage1_features": Row(
        "training step of stage 1, epochs after the first with `dataset.cache=features`",
        "pair",
        {
            "ours": "from the image encoder's outputs in float16, as they are kept; reading them from the disk is not counted",
            "recomputed": "the image encoder in each step",
            "lavis": "the image encoder in each step",
        },
        "numbers",
    ),
    "stage2": Row(
        "training step of stage 2, image encoder and language model frozen",
        "pair",
        {
            "ours": "`Stage2Objective` and its optimizer",
            "hf": "`Blip2ForConditionalGeneration.forward` with labels; LAVIS's way, too",
        },
        "numbers",
    ),
    "rerank": Row(
        "image-text matching, each image with its candidates",
        "pair",
        {
            "ours": "an image's encoding, keys and values once for all its texts",
            "hf": "`Blip2ForImageTextRetrieval.forward`, which takes pixels: the image is encoded with each text",
            "lavis": "the image encoded once, its patches repeated for each text",
        },
        "numbers",
    ),
    "vision": Row("image encoder alone", "image", {"ours": _FORWARD, "hf": _FORWARD}, "numbers"),
    "qformer": Row("Q-Former alone, its queries reading patches", "image", {"ours": _FORWARD, "hf": _FORWARD}, "numbers"),
    "language": Row(
        "language model alone, forward, logits of all tokens", "text", {"ours": _FORWARD, "hf": _FORWARD}, "numbers"
    ),
    "language_backward": Row(
        "language model alone, frozen: forward, and backward to its input",
        "text",
        {"ours": _FORWARD, "hf": _FORWARD},
        "numbers",
    ),
    "load": Row(
        "loading the model of stage 2 from its folder",
        "model",
        {"ours": "as the tasks load it, which checks every number", "hf": "`from_pretrained`"},
        "",
    ),
}
