"""Recall of image-text retrieval, both directions, with intervals; re-ranked shortlists; the pairs hardest to tell apart.

N images, M texts, K pairs, R queries (images or texts), C candidates of each, S of them on its shortlist.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from blip2x.errors import UserError
from blip2x.metrics.bootstrap import Interval, interval, resampled_means

_AT_ONCE = 1 << 22  # scores that are looked at together


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
    images, texts = len(image_id_N), len(text_image_id_M)
    if similarity_NM.shape != (images, texts):
        raise ValueError(f"similarity has shape {similarity_NM.shape} for {images} images, {texts} texts")
    require_finite(similarity_NM)
    return {
        **recall_of_rows("i2t", similarity_NM, image_id_N, text_image_id_M, ks),
        **recall_of_rows("t2i", similarity_NM.T, text_image_id_M, image_id_N, ks),
    }


def recall_of_rows(
    name: str,
    rows: Iterable[np.ndarray],
    query_id_R: Sequence[int],
    candidate_id_C: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """One direction of `recall_at_k`, as ``<name>_recall@k``: the means of `hits_of_rows`."""
    return _means(hits_of_rows(name, rows, query_id_R, candidate_id_C, ks))


def hits_of_rows(
    name: str,
    rows: Iterable[np.ndarray],
    query_id_R: Sequence[int],
    candidate_id_C: Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, np.ndarray]:
    """How likely each query [R] finds a right answer among the k best, as ``<name>_recall@k``: 0, 1 or, by a tie, between.

    A query's scores [C] may be made when they are asked for.

    Raises:
        UserError: a query has no partner.
    """
    right_of = right_candidates(query_id_R, candidate_id_C)
    hit_RK = np.empty((len(query_id_R), len(ks)))
    for place, (row, right) in enumerate(zip(rows, right_of, strict=True)):
        own = row[right]
        best = own.max()
        ahead, equal = np.count_nonzero(row > best), np.count_nonzero(row == best)
        tied = np.count_nonzero(own == best)
        hit_RK[place] = [_probability(k - ahead, tied, equal - tied) for k in ks]
    return {f"{name}_recall@{k}": hit_R for k, hit_R in zip(ks, hit_RK.T, strict=True)}


def right_candidates(query_id_R: Sequence[int], candidate_id_C: Sequence[int]) -> Iterator[np.ndarray]:
    """For each query the places of the candidates that have its number, rising; they are sorted once for all queries.

    Raises:
        UserError: a query has no partner.
    """
    order_C = np.argsort(candidate_id_C, kind="stable")
    sorted_C = np.asarray(candidate_id_C)[order_C]
    first_R, last_R = (np.searchsorted(sorted_C, query_id_R, side=side) for side in ("left", "right"))
    _check_partners(first_R < last_R)
    return (order_C[first:last] for first, last in zip(first_R.tolist(), last_R.tolist(), strict=True))


@dataclass(frozen=True)
class Hits:
    """What `hits_of_rows` found for images and for texts that are each other's candidates.

    Attributes:
        i2t: by name, of each image [N].
        t2i: by name, of each text [M].
        image_N: the images, any number that tells one from others.
        image_M: the image that each text describes.
    """

    i2t: dict[str, np.ndarray]
    t2i: dict[str, np.ndarray]
    image_N: np.ndarray
    image_M: np.ndarray

    def recalls(self) -> dict[str, float]:
        """By name, the share of queries."""
        return _means(self.i2t | self.t2i)

    def chance(self) -> float:
        """Recall at 1 of a random order."""
        return chance_recall(self.image_N, self.image_M)

    def r_mean(self) -> float:
        """The mean of the recalls."""
        return float(np.mean(list(self.recalls().values())))

    def intervals(self) -> dict[str, Interval | None]:
        """95 % intervals of the recalls and of ``r_mean``; images are drawn with all their texts, candidates stay."""
        hits = self.i2t | self.t2i
        images = [*[self.image_N] * len(self.i2t), *[self.image_M] * len(self.t2i)]
        ends = np.cumsum([0, *map(len, images)])
        parts = [range(*span) for span in itertools.pairwise(ends)]
        means_KR = resampled_means(np.concatenate([*hits.values()]), np.concatenate(images), parts)
        return {**dict(zip(hits, map(interval, means_KR), strict=True)), "r_mean": interval(means_KR.mean(axis=0))}


def require_finite(scores: np.ndarray) -> None:
    """Raise `UserError` where a score of an image and a text is no number."""
    flat = np.ravel(scores)  # in pieces, since a mask of all would take a quarter of their memory
    broken = sum(np.count_nonzero(~np.isfinite(flat[start : start + _AT_ONCE])) for start in range(0, len(flat), _AT_ONCE))
    if broken:
        raise UserError(f"{broken} of {scores.size} image-text scores are not finite; the model's weights are broken")


def shortlist(similarity_RC: np.ndarray, size: int) -> np.ndarray:
    """Places [R, S] of each query's most similar candidates, S = min(size, C), in no order."""
    size = min(size, similarity_RC.shape[1])
    best = np.empty((len(similarity_RC), size), dtype=np.int64)
    for place, row in enumerate(similarity_RC):
        best[place] = np.argpartition(row, -size)[-size:]
    return best


def largest(row_C: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest, falling; of equal ones the first. Only these are sorted."""
    if count < len(row_C):
        least = np.partition(row_C, -count)[-count]
        above, equal = np.flatnonzero(row_C > least), np.flatnonzero(row_C == least)
        chosen = np.concatenate([above, equal[: count - len(above)]])
    else:
        chosen = np.arange(len(row_C))
    return chosen[np.lexsort((chosen, -row_C[chosen]))]


@dataclass(frozen=True)
class Reranked:
    """Candidates ranked by similarity, those on a shortlist anew and before all others.

    Attributes:
        similarity_RC: higher is more alike.
        shortlist_RS: places of candidates.
        score_RS: of the candidates on the shortlist; higher is better, in any unit.
    """

    similarity_RC: np.ndarray
    shortlist_RS: np.ndarray
    score_RS: np.ndarray

    def row(self, query: int) -> np.ndarray:
        """Scores [C] in the order of the whole ranking: on the shortlist those given, else similarities, moved below these."""
        chosen, scores = self.shortlist_RS[query], self.score_RS[query].astype(np.float64)
        row = self.similarity_RC[query].astype(np.float64)
        row += scores.min() - row.max() - 1
        row[chosen] = scores
        return row


@dataclass(frozen=True)
class Shortlists:
    """The texts most similar to each image and the images most similar to each text, to be looked at again.

    Attributes:
        similarity_NM: higher is more alike.
        text_NS: places of texts, per image.
        image_MS: places of images, per text.
    """

    similarity_NM: np.ndarray
    text_NS: np.ndarray
    image_MS: np.ndarray

    @classmethod
    def of(cls, similarity_NM: np.ndarray, size: int) -> Shortlists:
        """The `size` best of each. Raises `UserError` where a similarity is no number."""
        require_finite(similarity_NM)
        return cls(similarity_NM, shortlist(similarity_NM, size), shortlist(similarity_NM.T, size))

    def pairs(self) -> np.ndarray:
        """The pairs on both kinds of lists, each once, as numbers image * M + text [K] int64, rising."""
        return np.unique(np.concatenate([numbers.ravel() for numbers in self._numbers()]))

    def rerank(self, pair_K: np.ndarray, score_K: np.ndarray) -> tuple[Reranked, Reranked]:
        """Texts of images, and images of texts, by what `score_K` says of `pairs` plus their similarity.

        Raises:
            UserError: a score is no number.
        """
        require_finite(score_K)
        text_of_image, image_of_text = (score_K[np.searchsorted(pair_K, numbers)] for numbers in self._numbers())
        similarity_MN = self.similarity_NM.T
        return (
            Reranked(self.similarity_NM, self.text_NS, text_of_image + _taken(self.similarity_NM, self.text_NS)),
            Reranked(similarity_MN, self.image_MS, image_of_text + _taken(similarity_MN, self.image_MS)),
        )

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        images, texts = self.similarity_NM.shape
        return np.arange(images)[:, None] * texts + self.text_NS, self.image_MS * texts + np.arange(texts)[:, None]


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
    image_N = np.arange(len(captions))
    first_N = np.cumsum([0, *(len(own) for own in captions)])[:-1]
    same_of: list[list[int]] = [[] for _ in captions]  # the texts that are no negatives of an image
    for column, text in enumerate(texts):
        for image in images_with[text]:
            same_of[image].append(column)
    text_N, score_N = np.empty(len(captions), np.int64), np.empty(len(captions))
    other_image_N, other_score_N = np.zeros(len(captions), np.int64), np.full(len(captions), -np.inf)
    for image, same in enumerate(same_of):  # a row at a time: a copy of all would be as large as they are
        row_M = similarity_NM[image, : len(texts)].copy()
        row_M[same] = -np.inf
        text_N[image] = row_M.argmax()
        score_N[image] = row_M[text_N[image]]
        better_N = row_M[first_N] > other_score_N
        other_image_N[better_N], other_score_N[better_N] = image, row_M[first_N][better_N]
    negatives = [
        np.stack([image, text, np.zeros_like(image)], axis=1)[np.isfinite(score)]
        for image, text, score in ((image_N, text_N, score_N), (other_image_N, first_N, other_score_N))
    ]
    return np.concatenate([np.stack([image_N, first_N, np.ones_like(image_N)], axis=1), *negatives])


def _means(hits: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(hit_R.mean()) for name, hit_R in hits.items()}


def _taken(similarity_RC: np.ndarray, place_RS: np.ndarray) -> np.ndarray:
    return np.take_along_axis(similarity_RC, place_RS, axis=1)


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
