"""What stands before and behind a model: pictures and texts to arrays, ids to texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from blip2x.api.inputs import as_texts
from blip2x.data.pictures import to_rgb
from blip2x.data.tokenize import TextTokenizer
from blip2x.data.transforms import EvalTransform

Arrays = dict[str, np.ndarray]


class Processor:
    """The tokenizer and the image transform that a model was trained with.

    Attributes:
        tokenizer: of the language model (stage 2) or of the Q-Former (stage 1).
        transform: one RGB picture to [3, S, S] float32.
    """

    def __init__(self, tokenizer: TextTokenizer, transform: EvalTransform):
        self.tokenizer = tokenizer
        self.transform = transform

    def __call__(
        self, images: Sequence[Image.Image] | Image.Image | None = None, text: str | Sequence[str] | None = None
    ) -> Arrays:
        """``pixel_values`` [B, 3, S, S] float32; ``input_ids`` and ``attention_mask`` [N, L] int64, of what is given.

        Prompts of a decoder (OPT) are padded on the left and left open, texts for an encoder closed by their end token.
        """
        arrays: Arrays = {}
        if images is not None:
            pictures = [images] if isinstance(images, Image.Image) else images
            arrays["pixel_values"] = np.stack([self.transform(to_rgb(picture, "given")) for picture in pictures])
        if text is not None:
            decoder = self.tokenizer.family == "opt"
            side = "left" if decoder else "right"
            ids, mask = self.tokenizer.encode(as_texts(text), max_length=None, padding_side=side, add_end=not decoder)
            arrays |= {"input_ids": ids, "attention_mask": mask}
        return arrays

    def batch_decode(self, ids: np.ndarray) -> list[str]:
        """Texts of rows of ids [N, T], without special tokens."""
        return [self.tokenizer.decode(row) for row in ids]
