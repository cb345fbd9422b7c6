"""Pictures of where the queries look: a heat map over the image, and beside it the queries that differ most.

Q queries, P patches (the class token before them where it is 1 + P), G patches of a side, H, W pixels.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip2x.engine.run import Run
from blip2x.models.qformer.attention import watch_queries
from blip2x.models.qformer.qformer import QFormer

MOST_LOOKS = 24  # images of a stage that such pictures are made of
_SINGLE = 3  # queries that are shown alone
_LONGER_SIDE = 320  # pixels of the large panel, or somewhat fewer: small pictures are enlarged by whole factors
_GAP, _LINE = 4, 18  # pixels between panels; of the line below them
_FONT_SIZE = 11
_HEAT = 0.6  # how much of a pixel is the heat's colour, the rest is the picture in grey
# Viridis (matplotlib, CC0): lighter is more to every kind of colour vision, and in print.
_COLOURS = np.array(
    [
        (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141),
        (39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37),
    ]
)  # fmt: skip


def draw_looks(places: Sequence[int]) -> frozenset[int]:
    """Which of the images at `places` such pictures are made of: drawn by lot, the same each time."""
    return frozenset(random.Random(0).sample(places, min(MOST_LOOKS, len(places))))


@contextmanager
def keep_shares(qformer: QFormer, rows: Mapping[int, int], shares: dict[int, np.ndarray]) -> Iterator[None]:
    """Inside, the last pass of the queries over a batch puts its images' shares [Q, 1 + P] into `shares`.

    Args:
        qformer: whose pass it is; one that does not happen leaves nothing.
        rows: key in `shares` -> row of the batch; none: nothing is computed.
        shares: is filled.
    """
    if not rows:
        yield
        return
    with watch_queries(qformer) as seen:
        yield
    for share_BQP in seen[-1:]:
        shares.update({key: share_BQP[row].numpy() for key, row in rows.items()})


def looks_file(thumbnail: bytes, share_QP: np.ndarray) -> bytes | None:
    """The picture of `picture_looks` as a PNG file's content; None where the patches form no square.

    Args:
        thumbnail: the image as a file's content.
        share_QP: [Q, 1 + P], see `watch_queries`.
    """
    patches = share_QP.shape[1] - 1
    if not patches or math.isqrt(patches) ** 2 != patches:
        return None
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(thumbnail)) as image:
        picture_looks(image.convert("RGB"), share_QP).save(buffer, "PNG")
    return buffer.getvalue()


def write_looks(run: Run, image_id: int, content: bytes) -> str:
    """Put what `looks_file` gave into the run's folder; its path there."""
    run.path("attention", f"{image_id}.png").write_bytes(content)
    return f"attention/{image_id}.png"


def picture_looks(picture: Image.Image, share_QP: np.ndarray) -> Image.Image:
    """The picture under the mean of all queries, right of it the queries that differ most, each with its number.

    What the class token gets has no place in the picture: the line below tells the mean of it, and the maps are of the rest.
    Each map's scale ends at its own peak, which the line gives for the mean, in multiples of an even look: a flat map is bright
    everywhere, with a peak of 1.

    Args:
        picture: RGB; the model saw it squeezed into a square, so the map is stretched over all of it.
        share_QP: [Q, 1 + P] of P = G * G patches, row by row.
    """
    token, patch_QP = float(share_QP[:, 0].mean()), _of_patches(share_QP)
    mean_P = patch_QP.mean(axis=0)
    grey = _enlarged(picture).convert("L")
    small = grey.resize((max(1, grey.width // _SINGLE), max(1, (grey.height - _GAP * (_SINGLE - 1)) // _SINGLE)))
    sheet = Image.new("RGB", (grey.width + _GAP + small.width, grey.height + _LINE), (24, 24, 24))
    sheet.paste(_heated(grey, mean_P), (0, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for place, query in enumerate(most_different(patch_QP, _SINGLE)):
        corner = grey.width + _GAP, place * (small.height + _GAP)
        sheet.paste(_heated(small, patch_QP[query]), corner)
        label = str(query)
        box = draw.textbbox((corner[0] + 3, corner[1] + 1), label, font=font)
        draw.rectangle((corner[0], corner[1], box[2] + 2, box[3] + 2), fill=(24, 24, 24))
        draw.text((corner[0] + 3, corner[1] + 1), label, font=font, fill="white")
    said = f"mean of {len(share_QP)} queries, peak {mean_P.max() * len(mean_P):.1f} x even, class token {100 * token:.0f} %"
    draw.text((3, grey.height + 2), said, font=font, fill="white")
    return sheet


def most_different(patch_QP: np.ndarray, count: int) -> list[int]:
    """`count` queries, or as many as there are, far from each other in what they look at: rising.

    The first two are the pair that differs most, by the share of the look that is elsewhere; each other one differs most from
    the nearest of those before.
    """
    distance_QQ = np.stack([np.abs(patch_QP - row_P).sum(axis=1) / 2 for row_P in patch_QP])
    chosen = [int(query) for query in np.unravel_index(distance_QQ.argmax(), distance_QQ.shape)]
    chosen = list(dict.fromkeys(chosen))[:count]
    while len(chosen) < min(count, len(patch_QP)):
        nearest_Q = distance_QQ[:, chosen].min(axis=1)
        nearest_Q[chosen] = -1
        chosen.append(int(nearest_Q.argmax()))
    return sorted(chosen)


def _of_patches(share_QP: np.ndarray) -> np.ndarray:
    """[Q, P], each query's look at patches alone as a sum of 1; an even one for a query that looks at the class token only."""
    patch_QP = share_QP[:, 1:].astype(np.float64)
    sum_Q1 = patch_QP.sum(axis=1, keepdims=True)
    even = np.full_like(patch_QP, 1 / patch_QP.shape[1])
    return np.divide(patch_QP, sum_Q1, out=even, where=sum_Q1 > 0)


def _enlarged(picture: Image.Image) -> Image.Image:
    """A picture much smaller than a panel, by a whole factor and with sharp pixels; else as it is."""
    factor = max(1, _LONGER_SIDE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _heated(grey: Image.Image, look_P: np.ndarray) -> Image.Image:
    """A grey picture under the colours of a map, whose patches keep their edges: the model knows nothing finer."""
    side = math.isqrt(len(look_P))
    heat_GG = (look_P / look_P.max()).reshape(side, side).astype(np.float32)
    heat_HW = np.asarray(Image.fromarray(heat_GG).resize(grey.size, Image.Resampling.NEAREST))
    steps = np.linspace(0, 1, len(_COLOURS))
    colour_HW3 = np.stack([np.interp(heat_HW, steps, channel) for channel in _COLOURS.T], axis=-1)
    mixed_HW3 = _HEAT * colour_HW3 + (1 - _HEAT) * np.asarray(grey, dtype=np.float32)[..., None]
    return Image.fromarray(mixed_HW3.round().astype(np.uint8))
