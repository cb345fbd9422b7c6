"""Recall of image-text retrieval, both directions, and the pairs that are hardest to tell apart.

N images, M texts, K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import numpy as np

from blip2x.errors import UserError


def recall_at_k(
    similarity_NM: np.ndarray, image_id_N: Sequence[int], text_image_id_M: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Share of queries with a right answer among the k best, as ``i2t_recall@k`` and ``t2i_recall@k``.

    Where scores are equal, as those of two images' identical captions are, it is the expected share if the tie is broken at
    random; a model that gives every pair the same score so gets what chance gets.

    Args:
        similarity_NM: higher is more alike.
        image_id_N: of each image.
        text_image_id_M: the image that each text describes; several texts may describe one.
        ks: how many of the best to look at.

    Raises:
        UserError: a score is no number, or an image or a text has no partner.
    """
    same_NM = np.asarray(image_id_N)[:, None] == np.asarray(text_image_id_M)[None, :]
    if similarity_NM.shape != same_NM.shape:
        raise ValueError(f"similarity has shape {similarity_NM.shape} for {same_NM.shape[0]} images, {same_NM.shape[1]} texts")
    broken = int((~np.isfinite(similarity_NM)).sum())
    if broken:
        raise UserError(f"{broken} of {similarity_NM.size} image-text scores are not finite; the model's weights are broken")
    return {
        f"{name}_recall@{k}": value
        for name, scores, same in (("i2t", similarity_NM, same_NM), ("t2i", similarity_NM.T, same_NM.T))
        for k, value in zip(ks, _recalls(scores, same, ks), strict=True)
    }


def chance_recall(image_id_N: Sequence[int], text_image_id_M: Sequence[int], k: int = 1) -> float:
    """Recall at k of random scores, the mean of both directions: what `recall_at_k` gives where all scores are equal.

    Raises:
        UserError: an image or a text has no partner.
    """
    return (_chance(image_id_N, text_image_id_M, k) + _chance(text_image_id_M, image_id_N, k)) / 2


def hardest_pairs(similarity_NM: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Pairs to judge, int64 [K, 3]: image, text, and whether they match (1) or not (0).

    They are each image with its first caption, with the most similar text that is none of its captions, and the image that is
    most similar to its first caption and has no such caption, with that caption. A text that two images share is no negative of
    either. What has no negative gives none, so K is at most 3 N.

    Args:
        similarity_NM: higher is more alike; may have further texts behind those of `captions`, which are left out.
        captions: of each image; the texts are all of them, one image after the other.
    """
    texts = [text for own in captions for text in own]
    if not texts:
        return np.zeros((0, 3), np.int64)
    images_with: dict[str, set[int]] = {}
    for image, own in enumerate(captions):
        for text in own:
            images_with.setdefault(text, set()).add(image)
    other_NM = similarity_NM[:, : len(texts)].copy()
    for column, text in enumerate(texts):
        other_NM[list(images_with[text]), column] = -np.inf
    image_N = np.arange(len(captions))
    first_N = np.cumsum([0, *(len(own) for own in captions)])[:-1]
    text_N, other_image_N = other_NM.argmax(axis=1), other_NM[:, first_N].argmax(axis=0)
    negatives = [
        np.stack([image, text, np.zeros_like(image)], axis=1)[np.isfinite(other_NM[image, text])]
        for image, text in ((image_N, text_N), (other_image_N, first_N))
    ]
    return np.concatenate([np.stack([image_N, first_N, np.ones_like(image_N)], axis=1), *negatives])


def _recalls(scores: np.ndarray, same: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """Recall at each k, averaged over the rows of `scores`."""
    _check_partners(same.any(axis=1))
    found = np.zeros(len(ks))
    for row, positive in zip(scores, same, strict=True):
        best = row[positive].max()
        ahead = int((row > best).sum())
        right, tied = int((row[positive] == best).sum()), int((row[~positive] == best).sum())
        found += [_probability(k - ahead, right, tied) for k in ks]
    return found / len(scores)


def _chance(query_ids: Sequence[int], candidate_ids: Sequence[int], k: int) -> float:
    """Share of queries for which one of their candidates is among k that are drawn at random."""
    queries, of = np.unique(query_ids, return_counts=True)
    candidates, rights = np.unique(candidate_ids, return_counts=True)
    right = dict(zip(candidates.tolist(), rights.tolist(), strict=True))
    _check_partners(np.isin(query_ids, candidates))
    found = [_probability(k, right[query], len(candidate_ids) - right[query]) for query in queries.tolist()]
    return float(np.average(found, weights=of))


def _check_partners(has_partner: np.ndarray) -> None:
    if not has_partner.all():
        raise UserError(f"{(~has_partner).sum()} of the images or texts to retrieve for have no partner among the others")


def _probability(places: int, right: int, wrong: int) -> float:
    """That one of `right` items comes among the first `places` of `right` + `wrong` in random order."""
    return 1 - comb(wrong, places) / comb(right + wrong, places) if 0 < places <= right + wrong else float(places > 0)
