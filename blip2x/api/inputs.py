"""Pictures and ids as people have them, to tensors as the networks want them.

B images, C colours, S pixels of a side, N texts, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor
from PIL import Image

from blip2x.data.pictures import to_rgb
from blip2x.data.transforms import EvalTransform
from blip2x.errors import UserError


class PictureReader:
    """Pictures, or arrays that a processor made of them, to float images [B, 3, S, S]."""

    def __init__(self, transform: EvalTransform, image_size: int, dtype: str):
        self.transform = transform
        self.image_size = image_size
        self.dtype = dtype  # the network's, which need not be paddle's default

    def __call__(self, images: Sequence[Image.Image] | Image.Image | None, pixel_values: np.ndarray | None) -> Tensor:
        """One of both has to be given.

        Raises:
            UserError: both or neither, or arrays of another shape.
        """
        if (images is None) == (pixel_values is None):
            raise UserError("give either images= (PIL pictures) or pixel_values= (an array [B, 3, S, S]), and not both")
        if images is not None:
            pictures = [images] if isinstance(images, Image.Image) else list(images)
            if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
                raise UserError("images= takes a PIL picture or several of them")
            pixel_values = np.stack([self.transform(to_rgb(picture, "given")) for picture in pictures])
        array = np.asarray(pixel_values, dtype=np.float32)
        wanted = (3, self.image_size, self.image_size)
        if array.ndim != 4 or array.shape[1:] != wanted:
            raise UserError(
                f"pixel_values has shape {list(array.shape)}, but this model reads [B, 3, {wanted[1]}, {wanted[2]}]"
            )
        return paddle.to_tensor(array).astype(self.dtype)


def ids_and_mask(input_ids: np.ndarray, attention_mask: np.ndarray | None, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [N, L] int64; without a mask all ids count.

    Raises:
        UserError: not two axes, a mask of another shape, or ids beyond the vocabulary.
    """
    ids_NL = np.asarray(input_ids)
    if ids_NL.ndim != 2 or ids_NL.dtype.kind not in "iu" or not ids_NL.size:
        raise UserError(f"input_ids has shape {list(ids_NL.shape)} and type {ids_NL.dtype}, but has to be whole numbers [B, L]")
    if ids_NL.min() < 0 or ids_NL.max() >= vocab_size:
        raise UserError(
            f"input_ids holds {ids_NL.min()} to {ids_NL.max()}, but this model's vocabulary is 0 to {vocab_size - 1}"
        )
    mask_NL = np.ones_like(ids_NL) if attention_mask is None else np.asarray(attention_mask)
    if mask_NL.shape != ids_NL.shape:
        raise UserError(f"attention_mask has shape {list(mask_NL.shape)}, but input_ids {list(ids_NL.shape)}")
    return paddle.to_tensor(ids_NL.astype(np.int64)), paddle.to_tensor(mask_NL.astype(np.int64))


def as_texts(texts: str | Sequence[str]) -> list[str]:
    """One text or several, as a list.

    Raises:
        UserError: no text, or something else than texts.
    """
    found = [texts] if isinstance(texts, str) else list(texts)
    if not found or not all(isinstance(text, str) for text in found):
        raise UserError(f"texts={texts!r}: give a text, or a list of at least one")
    return found
