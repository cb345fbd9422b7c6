"""Whole models write what Hugging Face transformers 4.57.6 writes, token for token, in random cases (see make_reference.py).

Cases that float32 noise can turn are marked as close, by the rule that make_reference.py tells; all others have to be equal.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2x

HERE = Path(__file__).parent
REFERENCE = {family: json.loads((HERE / f"{family}.json").read_text()) for family in ("opt", "t5")}
IMAGES = np.load(HERE / "images.npy")
PAD, START = {"opt": 1, "t5": 0}, {"opt": [], "t5": [0]}
BATCHES = [(family, number) for family, made in REFERENCE.items() for number in range(len(made["batches"]))]


@pytest.fixture(scope="module")
def load() -> Callable[[str], Any]:
    """The model of a family, loaded once."""
    return functools.cache(lambda family: blip2x.load(HERE / family)[0])


@pytest.mark.parametrize(("family", "number"), BATCHES)
def test_decided_cases_of_a_batch(family, number, load, close):
    batch = REFERENCE[family]["batches"][number]
    differing = []
    for case in decided(family):
        if case["batch"] != number:
            continue
        texts, out = write(load(family), family, case, batch["images"])
        expected = [strip(text, PAD[family]) for text in case["texts"]]
        settings = case["settings"]
        if texts != expected:
            differing.append(f"{settings}, end {case['eos']}\n  ours:   {texts}\n  theirs: {expected}")
        else:
            # below zero the penalty multiplies a sum and its rounding by the length
            unit = max(1.0, settings["max_new_tokens"] ** -settings["length_penalty"])
            close(f"scores of decoded texts, {family}", out.scores / unit, np.array(case["scores"]) / unit, atol=1e-4)
    assert not differing, f"{family}, batch {number}, {batch}:\n" + "\n".join(differing)


@pytest.mark.parametrize("family", REFERENCE)
def test_other_images_make_other_texts(family, load):
    cases = list({case["batch"]: case for case in decided(family)}.values())  # one of each batch
    changed = 0
    for case in cases:
        images = REFERENCE[family]["batches"][case["batch"]]["images"]
        own, others = (write(load(family), family, case, [(n + by) % len(IMAGES) for n in images])[0] for by in (0, 1))
        changed += own != others
    assert changed > len(cases) / 2


def write(model: Any, family: str, case: dict[str, Any], images: list[int]) -> tuple[list[list[int]], Any]:
    """Texts as tokens, up to their end, and all that `generate` returns."""
    batch = REFERENCE[family]["batches"][case["batch"]]
    out = model.generate(
        pixel_values=IMAGES[images],
        input_ids=np.array(batch["ids"]),
        attention_mask=np.array(batch["mask"]),
        eos_token_id=case["eos"],
        return_output=True,
        **case["settings"],
    )
    return [written(row.tolist(), family, case["eos"]) for row in out.ids], out


def decided(family: str) -> list[dict[str, Any]]:
    return [case for case in REFERENCE[family]["cases"] if not case.get("close")]


def written(row: list[int], family: str, eos: int) -> list[int]:
    """The new tokens, up to the end token: what stands behind it is padding."""
    start = START[family]
    assert row[: len(start)] == start
    row = row[len(start) :]
    return row[: row.index(eos) + 1] if eos in row else strip(row, PAD[family])


def strip(text: list[int], pad: int) -> list[int]:
    """Padding at the end of a row may be the text's own; scores, which divide by the length, tell how much of it is."""
    while text and text[-1] == pad:
        text = text[:-1]
    return text


@pytest.mark.parametrize("family", REFERENCE)
def test_enough_cases_are_decided(family):
    cases = REFERENCE[family]["cases"]
    assert len(decided(family)) >= 200
    assert len(decided(family)) > 0.85 * len(cases)


@pytest.mark.parametrize("family", REFERENCE)
def test_decided_cases_have_all_values_of_all_options(family):
    cases, batches = decided(family), REFERENCE[family]["batches"]
    options = {
        "num_beams": range(1, 6),
        "length_penalty": (-1, 0, 1, 2),
        "repetition_penalty": (1, 1.2, 1.5),
        "min_new_tokens": range(5),
        "max_new_tokens": range(4, 15),
        "early_stopping": (False, True),
        "num_return_sequences": range(1, 6),
    }
    for name, values in options.items():
        counts = Counter(case["settings"][name] for case in cases)
        assert counts.keys() == set(values), name
        assert min(counts.values()) >= 5, f"{name}: {counts}"
    assert {len(batches[case["batch"]]["ids"]) for case in cases} == {1, 2, 3}
    sides = {(row[0], row[-1]) for case in cases for row in batches[case["batch"]]["mask"]}
    assert sides == ({(1, 1), (0, 1)} if family == "opt" else {(1, 1), (0, 1), (1, 0)})


@pytest.mark.parametrize("family", REFERENCE)
def test_texts_end_early_late_and_not_at_all(family):
    texts = [(text, case) for case in decided(family) for text in case["texts"]]
    ended = [len(text) for text, case in texts if text[-1] == case["eos"]]
    assert 0.3 * len(texts) < len(ended) < 0.8 * len(texts)
    assert min(ended) == 1 and max(ended) > 10


def test_t5_writes_its_start_token():
    """Its repetition penalty counts that token from the start."""
    assert sum(0 in text for case in decided("t5") for text in case["texts"]) > 10
