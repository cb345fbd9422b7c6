"""Recall@k, ties and several captions per image included; the hardest pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from blip2x.errors import UserError
from blip2x.metrics.retrieval import Hits, Shortlists, chance_recall, hardest_pairs, hits_of_rows, recall_at_k, recall_of_rows


def test_hand_worked_case_with_two_captions_per_image():
    similarity = np.array(
        [  # texts of images 7, 7, 8, 8
            [0.1, 0.2, 0.9, 0.0],  # image 7: its best text comes second
            [0.5, 0.3, 0.8, 0.4],  # image 8: its best text comes first
        ]
    )
    # The texts find 8 (wrong), 8 (wrong), 7 (wrong), 8 (right).
    assert recall_at_k(similarity, [7, 8], [7, 7, 8, 8], ks=[1, 2]) == {
        "i2t_recall@1": 0.5,
        "i2t_recall@2": 1.0,
        "t2i_recall@1": 0.25,
        "t2i_recall@2": 1.0,
    }


def test_the_two_directions_are_told_apart():
    recalls = recall_at_k(np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.1], [0.2, 0.3, 0.4]]), [0, 1, 2], [0, 1, 2], ks=[1])
    assert recalls == {"i2t_recall@1": 1.0, "t2i_recall@1": pytest.approx(1 / 3)}


def test_ties_count_as_if_broken_at_random():
    scores = np.array([[1.0, 1.0, 1.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    ids, ks = ([3, 4], [3, 3, 4, 4, 4]), [1, 2, 3, 4, 5]
    nudges = [1e-6 * np.array(order) for order in itertools.permutations(range(5))]
    broken = [recall_at_k(scores + nudge, *ids, ks=ks) for nudge in nudges]
    found = recall_at_k(scores, *ids, ks=ks)
    for k in ks:
        expected = np.mean([recalls[f"i2t_recall@{k}"] for recalls in broken])
        assert found[f"i2t_recall@{k}"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 5])
def test_chance_is_what_random_scores_get(k):
    images, texts = list(range(20)), [i for i in range(20) for _ in range(3)]
    assert chance_recall(images, images) == pytest.approx(1 / 20)
    rng = np.random.default_rng(0)
    drawn = [np.mean(list(recall_at_k(rng.random((20, 60)), images, texts, [k]).values())) for _ in range(200)]
    assert chance_recall(images, texts, k) == pytest.approx(np.mean(drawn), abs=0.02)


@pytest.mark.parametrize("k", [1, 2, 5, 100])
def test_chance_is_what_equal_scores_get(k):
    """Whatever the numbers of texts per image are; some have no text of their own and share another's."""
    images, texts = np.array([7, 8, 8, 9, 12]), np.array([12, 7, 8, 9, 9, 9, 7, 7])
    equal = recall_at_k(np.zeros((5, 8)), images, texts, [k])
    assert chance_recall(images, texts, k) == pytest.approx(np.mean(list(equal.values())), abs=1e-12)


def test_chance_without_a_partner_is_named():
    with pytest.raises(UserError, match="2 of the images or texts to retrieve for have no partner"):
        chance_recall([1, 2, 3, 2], [1, 3])
    with pytest.raises(UserError, match="1 of the images or texts to retrieve for have no partner"):
        chance_recall([1], [1, 3])


def test_constant_scores_get_chance_and_not_everything():
    ids = [1, 2, 3, 4]
    assert recall_at_k(np.ones((4, 4)), ids, ids, [1])["i2t_recall@1"] == pytest.approx(0.25)


def test_more_places_than_candidates_always_find_it():
    assert set(recall_at_k(np.eye(2)[::-1], [1, 2], [1, 2], [2, 10]).values()) == {1.0}


def test_what_cannot_be_scored_is_named():
    with pytest.raises(UserError, match="1 of 4 image-text scores"):
        recall_at_k(np.array([[1.0, np.nan], [0.0, 1.0]]), [1, 2], [1, 2])
    with pytest.raises(UserError, match="1 of the images or texts"):
        recall_at_k(np.ones((2, 2)), [1, 2], [1, 1])
    with pytest.raises(ValueError, match=r"shape \(2, 2\) for 3 images"):
        recall_at_k(np.ones((2, 2)), [1, 2, 3], [1, 1])


def test_hardest_pairs_by_hand():
    captions = [["a", "b"], ["c"], ["a", "d"]]  # the text "a" is of two images, in columns 0 and 3
    similarity = np.array(
        [
            [0.9, 0.1, 0.3, 0.8, 0.2, 5.0],  # the last column is a text of an image that is not asked about
            [0.4, 0.6, 0.1, 0.5, 0.0, 5.0],
            [0.7, 0.2, 0.2, 0.9, 0.1, 5.0],
        ]
    )
    # image, text, matches: own first captions; hardest other texts (never "a" of images 0 and 2); hardest other images
    expected = [(0, 0, 1), (1, 2, 1), (2, 3, 1), (0, 2, 0), (1, 1, 0), (2, 1, 0), (1, 0, 0), (0, 2, 0), (1, 3, 0)]
    assert hardest_pairs(similarity, captions).tolist() == [list(pair) for pair in expected]


def test_what_has_no_other_image_or_text_gives_no_negative():
    assert hardest_pairs(np.array([[0.5]]), [["a"]]).tolist() == [[0, 0, 1]]
    assert hardest_pairs(np.ones((2, 2)), [["a"], ["a"]]).tolist() == [[0, 0, 1], [1, 1, 1]]
    assert hardest_pairs(np.ones((0, 3)), []).shape == (0, 3)


def test_shortlists_by_hand():
    """What is on no list is behind all that is, in the order of similarity, however bad the scores of the others are."""
    similarity = np.array([[0.9, 0.1, 0.8, 0.3], [0.2, 0.4, 0.5, 0.6]], dtype=np.float32)
    lists = Shortlists.of(similarity, 2)
    pairs = lists.pairs()  # image * 4 + text: texts 0, 2 of image 0, texts 2, 3 of image 1, and two images of each text are all
    assert pairs.tolist() == list(range(8))
    texts, images = lists.rerank(pairs, np.array([-9, 7, 5, 7, 7, 7, -1, -2], dtype=np.float32))
    assert np.argsort(-texts.row(0)).tolist() == [2, 0, 3, 1] and np.argsort(-texts.row(1)).tolist() == [2, 3, 1, 0]
    assert texts.row(0)[[2, 0]] == pytest.approx([5.8, -8.1]) and images.row(0) == pytest.approx([-8.1, 7.2])

    one = Shortlists.of(similarity, 1)
    assert one.pairs().tolist() == [0, 2, 5, 7]  # text 0 and image 0 chose each other, as did text 3 and image 1
    texts, images = one.rerank(one.pairs(), np.zeros(4, dtype=np.float32))
    assert np.argsort(-texts.row(1)).tolist() == [3, 2, 1, 0]
    assert [int(images.row(text).argmax()) for text in range(4)] == [0, 1, 0, 1]


def test_with_every_candidate_on_the_list_similarity_and_score_decide_together():
    rng = np.random.default_rng(0)
    similarity, score = rng.random((4, 9), dtype=np.float32), rng.random((4, 9), dtype=np.float32)
    lists = Shortlists.of(similarity, 100)
    texts, images = lists.rerank(lists.pairs(), score.ravel())
    for rows, expected in ((texts, similarity + score), (images, (similarity + score).T)):
        found = np.stack([rows.row(place) for place in range(len(expected))])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    owner = [0, 0, 0, 1, 1, 1, 2, 2, 3]
    both = recall_of_rows("i2t", map(texts.row, range(4)), range(4), owner)
    both |= recall_of_rows("t2i", map(images.row, range(9)), owner, range(4))
    assert both == recall_at_k(similarity + score, range(4), owner)


def test_broken_scores_are_named_before_and_behind_matching():
    with pytest.raises(UserError, match="1 of 4 image-text scores are not finite"):
        Shortlists.of(np.array([[1.0, np.inf], [0.0, 1.0]]), 1)
    lists = Shortlists.of(np.eye(2), 2)
    with pytest.raises(UserError, match="1 of 4 image-text scores are not finite"):
        lists.rerank(lists.pairs(), np.array([0, 1, np.nan, 0]))


def hits_of(hit_N, hit_MT) -> Hits:
    """Of images whose texts [T] are given in rows; found among the first or not at all."""
    image_N = np.arange(len(hit_N))
    texts = [(image, hit) for image, row in enumerate(hit_MT) for hit in row]
    image_M, hit_M = (np.array(column) for column in zip(*texts, strict=True))
    return Hits({"i2t_recall@1": np.array(hit_N, float)}, {"t2i_recall@1": hit_M.astype(float)}, image_N, image_M)


def test_hits_of_queries_have_recalls_as_their_means():
    similarity = np.array([[0.1, 0.2, 0.9, 0.0], [0.5, 0.3, 0.8, 0.4]])
    hits = hits_of_rows("i2t", similarity, [7, 8], [7, 7, 8, 8], ks=[1, 2])
    assert {name: hit.tolist() for name, hit in hits.items()} == {"i2t_recall@1": [0, 1], "i2t_recall@2": [1, 1]}
    own = hits_of([1, 0, 0, 0], [[1, 1], [1], [0], [1]])
    assert own.recalls() == {"i2t_recall@1": 0.25, "t2i_recall@1": 0.8} and own.r_mean() == pytest.approx(0.525)
    assert own.chance() == chance_recall(range(4), [0, 0, 1, 2, 3])


def test_intervals_draw_images_with_their_texts():
    """Against draws that are written out: both directions, and their mean, in each draw of images."""
    rng = np.random.default_rng(0)
    hit_N, hit_MT = rng.integers(0, 2, size=40), [rng.integers(0, 2, size=rng.integers(1, 7)).tolist() for _ in range(40)]
    found, means = hits_of(hit_N, hit_MT).intervals(), []
    for _ in range(4000):
        drawn = rng.integers(40, size=40)
        i2t, t2i = hit_N[drawn].mean(), np.mean([hit for image in drawn for hit in hit_MT[image]])
        means.append([i2t, t2i, (i2t + t2i) / 2])
    expected = np.quantile(means, [0.025, 0.975], axis=0).T
    for ends, name in zip(expected, ("i2t_recall@1", "t2i_recall@1", "r_mean"), strict=True):
        np.testing.assert_allclose(found[name], ends, atol=0.03)


def test_an_image_alone_has_no_interval():
    assert set(hits_of([1], [[1, 0]]).intervals().values()) == {None}
