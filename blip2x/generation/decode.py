"""From a prefix to token ids: one entry point for greedy decoding, beam search and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from blip2x.generation.beam import beam_search
from blip2x.generation.protocol import Decoder
from blip2x.generation.sample import sample
from blip2x.generation.settings import GenerationSettings


@dataclass(frozen=True)
class GenerationOutput:
    """New tokens only, the end token included; the results of one prefix stand together, best first with beams."""

    ids: np.ndarray  # int64 [B x num_return_sequences, T], padded behind the end token
    scores: np.ndarray  # float32 [B x num_return_sequences]: sum of log-probabilities / length ** length_penalty


@paddle.no_grad()
def generate(
    decoder: Decoder,
    prefix: Any,
    settings: GenerationSettings,
    *,
    eos_id: int,
    pad_id: int,
    start_id: int | None = None,
) -> GenerationOutput:
    """Continue each prefix as `settings` say; the decoder's layers should be in evaluation mode.

    Args:
        decoder: a language model or the Q-Former.
        prefix: what the decoder's `prefill` reads; all its rows are decoded as one batch.
        settings: how to decode.
        eos_id: the token that ends a text.
        pad_id: fills rows behind their end.
        start_id: the token that the decoder starts from; only the repetition penalty asks (T5's counts it, OPT has none).
    """
    logits_BV, state = decoder.prefill(prefix)
    search = beam_search if settings.num_beams > 1 else sample
    ids, scores = search(decoder, logits_BV, state, settings, eos_id=eos_id, pad_id=pad_id, start_id=start_id)
    longest = int((ids != pad_id).any(axis=0).nonzero()[0].max(initial=-1)) + 1
    return GenerationOutput(ids[:, :longest], scores)
