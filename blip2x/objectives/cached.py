"""Contrast among all micro-batches of a step, by cached gradients.

GradCache: Luyu Gao, Yunyi Zhang, Jiawei Han and Jamie Callan, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", RepL4NLP 2021, arXiv 2101.06983. The features of all micro-batches are computed first, without a graph; the loss
of all of them gives each feature's gradient; then each micro-batch is computed again, with its graph, and goes back from these
gradients. Gradients are those of the large batch, and the graph takes the memory of a micro-batch. Beside it, where the image
encoder is frozen, a rank keeps the patches of all of its micro-batches, and as many again of the images they are matched with.

B pairs of a micro-batch, N pairs of all of a rank's micro-batches, Q queries, P patches, C colours, H and W pixels, D width of
the image encoder, E width of the shared space, L text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import Tensor

from blip2x.parallel.context import Context


@dataclass(frozen=True)
class Others:
    """What a micro-batch's pairs are matched with: an image for each text and a text for each image.

    Args:
        place_B: the images' places in the micro-batch, all of them being there; None: the next two say which they are.
        encoded_BPD: the images, as the encoder gives them; None: `image_BCHW` have to go through it.
        image_BCHW: the images.
        has_image_B: whether there is one.
        ids_BL: the texts.
        mask_BL: their tokens.
        has_text_B: whether there is one.
    """

    place_B: Tensor | None
    encoded_BPD: Tensor | None
    image_BCHW: Tensor | None
    has_image_B: Tensor
    ids_BL: Tensor
    mask_BL: Tensor
    has_text_B: Tensor


@dataclass(frozen=True)
class Cached:
    """What a micro-batch must know of the step's others.

    Args:
        encoded_BPD: the frozen image encoder's output; None: it is trained.
        generator_state: where the random numbers of the features begin.
        itc: this rank's contrast loss.
        image_gradient_BQE: such that the mean over micro-batches and ranks of the sums over feature * gradient has the gradient
            of the mean contrast loss.
        text_gradient_BE: likewise.
        temperature_gradient: likewise, [1].
        others: None where nothing is matched.
    """

    encoded_BPD: Tensor | None
    generator_state: list[Any]
    itc: Tensor
    image_gradient_BQE: Tensor
    text_gradient_BE: Tensor
    temperature_gradient: Tensor
    others: Others | None

    def contrast(self, image_BQE: Tensor, text_BE: Tensor, temperature: Tensor) -> Tensor:
        """The contrast loss: its value is `itc`, its gradient the cached one."""
        pairs = (
            (image_BQE, self.image_gradient_BQE),
            (text_BE, self.text_gradient_BE),
            (temperature, self.temperature_gradient),
        )
        score = paddle.add_n([(value.astype("float32") * gradient).sum() for value, gradient in pairs])
        return self.itc + (score - score.detach())


def choose(micro_batches: Sequence[Tensor], index_N: Tensor, context: Context) -> list[Tensor]:
    """For each of this rank's rows, that row `index_N` of all, by micro-batch.

    Rows are counted as if each rank had one batch: ranks, then micro-batches, then rows. One micro-batch of all ranks is
    gathered at a time, so that no rank ever holds the patches of the whole step.
    """
    count, rows = len(micro_batches), micro_batches[0].shape[0]
    micro_N = index_N // rows % count
    place_N = index_N // (rows * count) * rows + index_N % rows
    chosen = None
    for number, tensor in enumerate(micro_batches):
        found = context.all_gather(tensor).index_select(place_N)
        here = (micro_N == number).reshape([-1] + [1] * (tensor.ndim - 1))
        chosen = found if chosen is None else paddle.where(here, found, chosen)
    return chosen.split(count)


@contextmanager
def drawing_from(generator_state: list[Any]) -> Iterator[None]:
    """Draw paddle's random numbers from there on; afterwards they go on where they were before."""
    before = paddle.get_rng_state()
    paddle.set_rng_state(generator_state)
    try:
        yield
    finally:
        paddle.set_rng_state(before)
