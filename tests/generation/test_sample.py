from __future__ import annotations

import numpy as np
import paddle
import pytest

from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings

EOS, PAD = 1, 0


def decode(decoder, prefixes, start_id=None, **options):
    settings = GenerationSettings(**options)
    return generate(decoder, paddle.to_tensor(prefixes), settings, eos_id=EOS, pad_id=PAD, start_id=start_id)


def greedy(decoder, first, steps, penalty=1.0, start_id=None, shortest=0) -> list[int]:
    tokens: list[int] = []
    for _ in range(steps):
        history = first
        for token in tokens:
            history = (history * 31 + token + 1) % len(decoder.table)
        logits = decoder.table[history].astype(np.float64)
        for token in {*tokens, *([] if start_id is None else [start_id])}:
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        if len(tokens) < shortest:
            logits[EOS] = -np.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


@pytest.mark.parametrize(("penalty", "start_id", "shortest"), [(1.0, None, 0), (1.5, None, 0), (3.0, 4, 0), (1.5, None, 5)])
def test_greedy_takes_the_best_token_each_time(toy, penalty, start_id, shortest):
    decoder, prefixes = toy(vocabulary=9, seed=4), list(range(20))
    out = decode(decoder, prefixes, start_id=start_id, max_new_tokens=8, repetition_penalty=penalty, min_new_tokens=shortest)
    expected = [greedy(decoder, first, 8, penalty, start_id, shortest) for first in prefixes]
    assert len({len(tokens) for tokens in expected}) > 1
    for row, tokens in zip(out.ids, expected, strict=True):
        assert row.tolist() == tokens + [PAD] * (out.ids.shape[1] - len(tokens))
    assert out.ids.shape[1] == max(map(len, expected))


def test_penalty_counts_the_start_token_only_where_there_is_one(toy):
    decoder, prefixes = toy(vocabulary=9, seed=4), list(range(20))
    options = {"max_new_tokens": 8, "repetition_penalty": 3.0}
    assert not np.array_equal(decode(decoder, prefixes, **options).ids, decode(decoder, prefixes, start_id=4, **options).ids)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_scores_are_the_models_own_log_probabilities(toy, length_penalty):
    decoder, prefixes = toy(vocabulary=9, seed=4), list(range(20))
    out = decode(decoder, prefixes, max_new_tokens=8, do_sample=True, top_k=3, temperature=2.0, length_penalty=length_penalty)
    for first, row, score in zip(prefixes, out.ids.tolist(), out.scores, strict=True):
        tokens = tuple(row[: row.index(EOS) + 1] if EOS in row else row)
        total = sum(decoder.log_probabilities(first, tokens[:n])[token] for n, token in enumerate(tokens))
        assert score == pytest.approx(total / len(tokens) ** length_penalty, rel=1e-4)


def test_finished_rows_are_not_read_on(toy):
    decoder, prefixes = toy(vocabulary=9, seed=4), list(range(20))
    decode(decoder, prefixes, max_new_tokens=8)
    assert decoder.rows_read == sum(
        len(greedy(decoder, first, 8)) - (greedy(decoder, first, 8)[-1] == EOS) for first in prefixes
    ) - sum(greedy(decoder, first, 8)[-1] != EOS for first in prefixes)


def test_samples_follow_the_distribution(toy):
    paddle.seed(0)
    decoder, count = toy(vocabulary=6, seed=4, scale=1.0), 20000
    out = decode(decoder, [7], max_new_tokens=1, do_sample=True, temperature=0.7, num_return_sequences=count)
    weights = np.exp(decoder.log_probabilities(7, ()) / 0.7)
    probability = weights / weights.sum()
    seen = np.bincount(out.ids[:, 0], minlength=6) / count
    assert (np.abs(seen - probability) < 4 * np.sqrt(probability / count)).all()


def test_one_likeliest_token_is_greedy(toy):
    decoder, prefixes = toy(vocabulary=9, seed=4), list(range(20))
    best = decode(decoder, prefixes, max_new_tokens=8).ids
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        np.testing.assert_array_equal(decode(decoder, prefixes, max_new_tokens=8, do_sample=True, **option).ids, best)


def test_results_of_one_prefix_stand_together(toy):
    decoder = toy(vocabulary=9, seed=4, scale=8.0)
    firsts = [int(np.argmax(decoder.table[first])) for first in (3, 4)]
    out = decode(decoder, [3, 4], max_new_tokens=1, do_sample=True, top_k=1, num_return_sequences=3)
    assert firsts[0] != firsts[1] and out.ids[:, 0].tolist() == [firsts[0]] * 3 + [firsts[1]] * 3
