"""One token per row and step: the best one (greedy), or one drawn by probability.

B prefixes, N rows still open, R results per prefix, T new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from blip2x.generation.logits import gumbel_noise, process
from blip2x.generation.protocol import Decoder
from blip2x.generation.settings import GenerationSettings
from blip2x.losses.log_softmax import log_softmax


def sample(
    decoder: Decoder,
    logits_BV: Tensor,
    state: Any,
    settings: GenerationSettings,
    *,
    eos_id: int,
    pad_id: int,
    start_id: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Continue a prefilled state: ids [B x R, T], and sums of the tokens' log-probabilities / length ** length_penalty.

    The scores are the model's own probabilities, whatever the options did to the choice.
    """
    results = settings.num_return_sequences
    open_N = np.arange(logits_BV.shape[0] * results)  # the results that go on
    ids = np.full((len(open_N), settings.max_new_tokens), pad_id, dtype=np.int64)
    logprob, length = np.zeros(len(open_N), np.float32), np.zeros(len(open_N), np.int64)
    logits_NV = logits_BV
    if results > 1:
        index_N = paddle.to_tensor(open_N // results)
        logits_NV, state = paddle.index_select(logits_BV, index_N, axis=0), decoder.reorder(state, index_N)
    for step in range(settings.max_new_tokens):
        seen_NT = seen_tokens(ids[open_N, :step], start_id)
        scores_NV = process(logits_NV, seen_NT, settings, length=step, eos_id=eos_id)
        if settings.do_sample:
            scores_NV = scores_NV + gumbel_noise(scores_NV)
        token_N = scores_NV.argmax(axis=1)
        chosen_N1 = paddle.take_along_axis(log_softmax(logits_NV, axis=1), token_N.unsqueeze(1), axis=1)
        ids[open_N, step] = token_N.numpy()
        logprob[open_N] += chosen_N1.squeeze(1).numpy()
        length[open_N] += 1
        goes_on_N = ids[open_N, step] != eos_id
        if step + 1 == settings.max_new_tokens or not goes_on_N.any():
            break
        if not goes_on_N.all():
            index_N = paddle.to_tensor(np.flatnonzero(goes_on_N))
            token_N, state = paddle.index_select(token_N, index_N, axis=0), decoder.reorder(state, index_N)
            open_N = open_N[goes_on_N]
        logits_NV, state = decoder.step(token_N, state)
    return ids[:, : length.max()], logprob / length.astype(np.float32) ** settings.length_penalty


def seen_tokens(ids_NT: np.ndarray, start_id: int | None) -> Tensor:
    """What the repetition penalty counts: the new tokens, behind the start token where there is one."""
    if start_id is not None:
        ids_NT = np.concatenate([np.full((len(ids_NT), 1), start_id, np.int64), ids_NT], axis=1)
    return paddle.to_tensor(ids_NT)
