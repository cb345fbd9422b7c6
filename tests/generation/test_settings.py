from __future__ import annotations

import dataclasses

import pytest

from blip2x.config.task import DecodingConfig
from blip2x.errors import UserError
from blip2x.generation.settings import GenerationSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ({"min_new_tokens": 6}, "min_new_tokens must lie in 0 to max_new_tokens=5, got 6"),
        ({"min_new_tokens": -1}, "got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "got 1.1"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        ({"num_beams": 3, "num_return_sequences": 4}, "num_return_sequences=4 is more than num_beams=3"),
        ({"num_return_sequences": 2}, "use beams or do_sample=true"),
    ],
)
def test_mistake_is_named(options, message):
    with pytest.raises(UserError, match=message):
        GenerationSettings(**{"max_new_tokens": 5, **options})


def test_every_decoding_option_arrives():
    values = {
        "num_beams": 4,
        "do_sample": True,
        "top_p": 0.9,
        "top_k": 7,
        "temperature": 0.5,
        "max_new_tokens": 12,
        "min_new_tokens": 3,
        "length_penalty": -1.0,
        "repetition_penalty": 1.2,
        "num_return_sequences": 2,
        "early_stopping": True,
    }
    assert dataclasses.asdict(GenerationSettings.from_config(DecodingConfig(**values))) == values
    assert values.keys() == {field.name for field in dataclasses.fields(DecodingConfig)} - {"kind", "weights_dtype"}
