from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.generation.logits import (
    best,
    forbid,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    log_sum_exp,
    penalize_repetition,
    process,
)
from blip2x.generation.settings import GenerationSettings

SCORES = np.random.default_rng(0).standard_normal((5, 11)).astype(np.float32)
SEEN = np.random.default_rng(1).integers(0, 11, (5, 4))


def run(function, *arguments) -> np.ndarray:
    return function(paddle.to_tensor(SCORES), *arguments).numpy()


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64))
    return weights / weights.sum()


def nucleus(row: np.ndarray, p: float, at_least: int) -> set[int]:
    kept, mass = set(), 0.0
    for token in sorted(range(len(row)), key=lambda token: -row[token]):
        if mass >= p and len(kept) >= at_least:
            break
        kept.add(token)
        mass += softmax(row)[token]
    return kept


def test_repetition_penalty_counts_a_token_once_and_lowers_both_signs():
    expected = SCORES.copy()
    for row, seen in zip(expected, SEEN, strict=True):
        for token in set(seen.tolist()):
            row[token] = row[token] * 1.5 if row[token] < 0 else row[token] / 1.5
    np.testing.assert_allclose(run(penalize_repetition, paddle.to_tensor(SEEN), 1.5), expected, rtol=1e-6)
    assert len(set(SEEN[0])) < SEEN.shape[1] and (expected <= SCORES).all()  # the case has a repeated token


def test_forbidden_token_and_nothing_else():
    out = run(forbid, 3)
    assert np.isneginf(out[:, 3]).all()
    np.testing.assert_array_equal(np.delete(out, 3, axis=1), np.delete(SCORES, 3, axis=1))


@pytest.mark.parametrize("k", [1, 4, 11, 50])
def test_top_k(k):
    out = run(keep_top_k, k)
    for row, scores in zip(out, SCORES, strict=True):
        best = np.argsort(-scores)[:k]
        assert set(np.flatnonzero(np.isfinite(row))) == set(best)
        np.testing.assert_array_equal(row[best], scores[best])


@pytest.mark.parametrize("at_least", [1, 2])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(p, at_least):
    out = run(keep_top_p, p, at_least)
    for row, scores in zip(out, SCORES, strict=True):
        kept = np.flatnonzero(np.isfinite(row))
        assert set(kept) == nucleus(scores, p, at_least)
        np.testing.assert_array_equal(row[kept], scores[kept])


def test_order_is_transformers_order():
    """The nucleus is taken of the penalised, cooled scores of the best k tokens."""
    settings = GenerationSettings(
        max_new_tokens=9, min_new_tokens=5, do_sample=True, top_k=6, top_p=0.8, temperature=0.5, repetition_penalty=1.3
    )
    expected = run(penalize_repetition, paddle.to_tensor(SEEN), 1.3)
    expected[:, 2] = -np.inf
    expected /= 0.5
    for row in expected:
        row[np.argsort(-row)[6:]] = -np.inf
        row[[token for token in range(11) if token not in nucleus(row, 0.8, 1)]] = -np.inf
    out = process(paddle.to_tensor(SCORES), paddle.to_tensor(SEEN), settings, length=4, eos_id=2).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_end_is_allowed_from_the_shortest_length_on():
    settings = GenerationSettings(max_new_tokens=9, min_new_tokens=3)
    ends = [run(lambda s, n=n: process(s, paddle.to_tensor(SEEN), settings, length=n, eos_id=2))[0, 2] for n in (1, 2, 3)]
    assert np.isneginf(ends[:2]).all() and ends[2] == SCORES[0, 2]  # the third token may be the end


def test_greedy_and_beams_ignore_what_is_for_sampling():
    settings = GenerationSettings(max_new_tokens=9, top_k=1, top_p=0.1, temperature=3.0)
    np.testing.assert_array_equal(run(lambda s: process(s, paddle.to_tensor(SEEN), settings, length=4, eos_id=2)), SCORES)


def test_gumbel_noise_draws_by_probability_without_replacement():
    paddle.seed(0)
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    scores = paddle.to_tensor(np.tile(logits, (20000, 1)))
    pairs = paddle.topk(scores + gumbel_noise(scores), 2, axis=1)[1].numpy()
    for first, second in [(0, 1), (1, 0), (2, 3)]:
        probability = np.exp(logits[first]) * np.exp(logits[second]) / (1 - np.exp(logits[first]))
        seen = ((pairs[:, 0] == first) & (pairs[:, 1] == second)).mean()
        assert abs(seen - probability) < 4 * np.sqrt(probability / 20000)


@pytest.mark.parametrize(("words", "count"), [(1000, 4), (1000, 40), (97, 3), (5, 10)])
def test_best_tokens_of_large_and_small_vocabularies(words, count):
    scores = np.random.default_rng(2).standard_normal((6, words)).astype(np.float32)
    scores[:, 3] = -np.inf
    scores[0, -1] = 9  # behind the last whole block
    found, tokens = (tensor.numpy() for tensor in best(paddle.to_tensor(scores), count))
    np.testing.assert_array_equal(tokens, np.argsort(-scores, axis=1)[:, :count])
    np.testing.assert_array_equal(found, np.take_along_axis(scores, tokens, axis=1))


def test_log_sum_exp_of_near_and_far_logits():
    logits = np.random.default_rng(3).standard_normal((4, 300)).astype(np.float32) * np.array([[0.1], [1], [30], [300]], "f4")
    logits[0, 5] = -np.inf
    exact = logits.astype(np.float64)
    expected = np.log(np.exp(exact - exact.max(axis=1, keepdims=True)).sum(axis=1)) + exact.max(axis=1)
    given = paddle.to_tensor(logits)
    np.testing.assert_allclose(log_sum_exp(given).numpy()[:, 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(given.numpy(), logits)  # they are still needed
