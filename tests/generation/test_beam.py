"""Beam search against exhaustive search, and against a plain search over one image's list of hypotheses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import paddle
import pytest

from blip2x.generation import beam
from blip2x.generation.decode import generate
from blip2x.generation.settings import GenerationSettings

EOS, PAD = 1, 0


def search(decoder, prefixes, **options):
    settings = GenerationSettings(**options)
    return generate(decoder, paddle.to_tensor(prefixes), settings, eos_id=EOS, pad_id=PAD)


def text(row: np.ndarray) -> tuple[int, ...]:
    tokens = row.tolist()
    return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


def all_texts(decoder, first: int, steps: int, length_penalty: float) -> dict[tuple[int, ...], float]:
    """Every text that ends within `steps` tokens or is cut off there, with its score."""
    scores: dict[tuple[int, ...], float] = {}
    level = {(): 0.0}
    for length in range(1, steps + 1):
        longer = {}
        for tokens, total in level.items():
            for token, logprob in enumerate(decoder.log_probabilities(first, tokens)):
                grown = (*tokens, token)
                if token == EOS or length == steps:
                    scores[grown] = (total + logprob) / length**length_penalty
                else:
                    longer[grown] = total + logprob
        level = longer
    return scores


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_wide_beams_find_the_best_texts_of_all(toy, length_penalty):
    decoder, steps = toy(vocabulary=4, seed=3), 3
    out = search(decoder, [5, 6, 7], num_beams=48, num_return_sequences=3, max_new_tokens=steps, length_penalty=length_penalty)
    for number, first in enumerate([5, 6, 7]):
        texts = all_texts(decoder, first, steps, length_penalty)
        best = sorted(texts, key=texts.get, reverse=True)[:3]
        rows = slice(3 * number, 3 * number + 3)
        if length_penalty <= 0:  # the rule that stops the search is exact: a live text cannot get better
            assert [text(row) for row in out.ids[rows]] == best
        np.testing.assert_allclose(out.scores[rows], [texts[text(row)] for row in out.ids[rows]], rtol=1e-5)
        assert text(out.ids[rows.start]) in best


def plain_beam_search(decoder, first, beams, steps, length_penalty, early, penalty, shortest):
    """One image, lists of (score, tokens): returns the ended texts, best first."""
    live, ended = [(0.0, ())], []
    for length in range(1, steps + 1):
        candidates = []
        for total, tokens in live:
            logprobs = decoder.log_probabilities(first, tokens)
            for token in set(tokens):
                logprobs[token] *= penalty
            if length <= shortest:
                logprobs[EOS] = -math.inf
            candidates += [(total + logprob, (*tokens, token)) for token, logprob in enumerate(logprobs)]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        live = []
        for rank, (total, tokens) in enumerate(candidates):
            if tokens[-1] == EOS or length == steps:
                if rank < beams and total > -math.inf:
                    ended.append((total / length**length_penalty, tokens))
            elif len(live) < beams:
                live.append((total, tokens))
        ended = sorted(ended, reverse=True)[:beams]
        if len(ended) == beams and (early or (live and live[0][0] / length**length_penalty <= ended[-1][0])):
            break
    return ended


OPTIONS = itertools.product((2, 3), (-1.0, 0.0, 1.0, 2.0), (False, True), (1.0, 1.4), (0, 3))


@pytest.mark.parametrize(("beams", "length_penalty", "early", "penalty", "shortest"), OPTIONS)
def test_agrees_with_a_plain_search(toy, beams, length_penalty, early, penalty, shortest):
    decoder, prefixes, steps = toy(vocabulary=9, seed=beams), list(range(10, 30)), 7
    out = search(
        decoder,
        prefixes,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=steps,
        min_new_tokens=shortest,
        length_penalty=length_penalty,
        repetition_penalty=penalty,
        early_stopping=early,
    )
    for number, first in enumerate(prefixes):
        expected = plain_beam_search(decoder, first, beams, steps, length_penalty, early, penalty, shortest)
        rows = slice(beams * number, beams * (number + 1))
        assert [text(row) for row in out.ids[rows]] == [tokens for _, tokens in expected]
        np.testing.assert_allclose(out.scores[rows], [score for score, _ in expected], rtol=1e-4)


@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 2.0])
@pytest.mark.parametrize(("results", "penalty", "shortest"), [(1, 1.0, 0), (2, 1.0, 0), (1, 0.5, 0), (3, 1.4, 3)])
def test_a_search_that_is_settled_ends_and_finds_the_same(toy, monkeypatch, scale, length_penalty, results, penalty, shortest):
    options = {
        "num_beams": 3,
        "num_return_sequences": results,
        "max_new_tokens": 9,
        "min_new_tokens": shortest,
        "length_penalty": length_penalty,
        "repetition_penalty": penalty,
    }
    decoder = toy(vocabulary=9, seed=5, scale=scale)
    decoder.table[:, EOS] += scale
    decoder.logits_SV = paddle.to_tensor(decoder.table)
    soon = search(decoder, list(range(40)), **options)
    soon_read, decoder.rows_read = decoder.rows_read, 0
    monkeypatch.setattr(beam, "_is_settled", lambda beams, *_: np.zeros(len(beams.score_BK), bool))
    late = search(decoder, list(range(40)), **options)
    np.testing.assert_array_equal(soon.ids, late.ids)
    np.testing.assert_array_equal(soon.scores, late.scores)
    assert soon_read <= decoder.rows_read
    if scale == 8.0 and results == 1:  # sure of its words, as a trained model
        assert soon_read < 0.8 * decoder.rows_read


def test_drawn_texts_of_an_image_do_not_depend_on_when_others_are_settled(toy, monkeypatch):
    decoder, options = toy(vocabulary=9, seed=2), {"num_beams": 3, "do_sample": True, "max_new_tokens": 8}
    paddle.seed(0)
    with_rule = search(decoder, list(range(30)), **options)
    monkeypatch.setattr(beam, "_is_settled", lambda beams, *_: np.zeros(len(beams.score_BK), bool))
    paddle.seed(0)
    np.testing.assert_array_equal(with_rule.ids, search(decoder, list(range(30)), **options).ids)


def test_one_of_the_options_changes_what_is_found(toy):
    """The comparison above would pass with options that do nothing, if the reference shared the mistake."""
    decoder, prefixes = toy(vocabulary=9, seed=2), list(range(10, 30))
    base = {"num_beams": 3, "max_new_tokens": 7}
    plain = [text(row) for row in search(decoder, prefixes, **base).ids]
    for option in ({"length_penalty": 3.0}, {"early_stopping": True}, {"repetition_penalty": 1.4}, {"min_new_tokens": 6}):
        changed = [text(row) for row in search(decoder, prefixes, **base, **option).ids]
        assert changed != plain, option
    assert all(len(tokens) >= 6 for tokens in changed)


def test_rows_are_padded_behind_the_end(toy):
    out = search(toy(vocabulary=9, seed=2), list(range(10, 30)), num_beams=3, max_new_tokens=12)
    lengths = [len(text(row)) for row in out.ids]
    assert len(set(lengths)) > 1 and out.ids.shape[1] == max(lengths) and out.ids.dtype == np.int64
    for row, length in zip(out.ids, lengths, strict=True):
        assert (row[length:] == PAD).all()


def test_an_image_is_searched_alike_in_any_batch_and_left_out_when_done(toy):
    decoder, prefixes = toy(vocabulary=9, seed=2), list(range(10, 30))
    together = search(decoder, prefixes, num_beams=3, max_new_tokens=12)
    batched, decoder.rows_read = decoder.rows_read, 0
    for number, first in enumerate(prefixes):
        alone = search(decoder, [first], num_beams=3, max_new_tokens=12)
        assert text(alone.ids[0]) == text(together.ids[number])
        assert alone.scores[0] == pytest.approx(together.scores[number], rel=1e-5)
    assert batched == decoder.rows_read  # no row is stepped on after its image is done


def test_sampled_beams_differ_by_seed_and_carry_their_own_scores(toy):
    decoder, prefixes = toy(vocabulary=9, seed=2), list(range(10, 20))
    runs = []
    for seed in (0, 0, 1):
        paddle.seed(seed)
        runs.append(search(decoder, prefixes, num_beams=3, do_sample=True, max_new_tokens=6, length_penalty=0.0))
    assert np.array_equal(runs[0].ids, runs[1].ids) and not np.array_equal(runs[0].ids, runs[2].ids)
    for number, first in enumerate(prefixes):
        tokens = text(runs[0].ids[number])
        total = sum(decoder.log_probabilities(first, tokens[:n])[token] for n, token in enumerate(tokens))
        assert runs[0].scores[number] == pytest.approx(total, rel=1e-4)


def test_sampled_beams_can_go_on_when_the_end_is_the_whole_nucleus(toy):
    decoder = toy(vocabulary=9, seed=2)
    decoder.table[:, EOS] = 30
    decoder.logits_SV = paddle.to_tensor(decoder.table)
    out = search(decoder, [10], num_beams=2, do_sample=True, top_k=1, top_p=0.1, max_new_tokens=4)
    assert text(out.ids[0]) == (EOS,)
