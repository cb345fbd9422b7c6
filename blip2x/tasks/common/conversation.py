"""Several prompts about each of several images, which are encoded once: each by itself, or as one conversation per image.

B images, Q queries, D width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from blip2x.config.model import OptConfig, T5Config
from blip2x.tasks.common.captioning import Text

Write = Callable[[Tensor, list[str]], list[list[Text]]]  # query_NQD, N prompts -> each prompt's texts, best first
_STOPS = (".", "!", "?")


def prompt_room(positions: float, queries: int, new_tokens: int) -> float:
    """Tokens that a prompt may have, without the one that all of a decoder's texts begin with.

    That one has a position, and the last new token has none, as nothing is read behind it.

    Args:
        positions: of the language model, see `positions_of`.
        queries: that stand before the prompt.
        new_tokens: that may be written behind it.
    """
    return positions - queries - new_tokens


def positions_of(language: OptConfig | T5Config) -> float:
    """Tokens that a language model can read, queries included; T5, whose positions are relative, has no limit."""
    return language.max_positions if isinstance(language, OptConfig) else math.inf


def conversation_prompt(
    template: str, asked: str, turns: Sequence[tuple[str, str]], fits: Callable[[str], bool]
) -> tuple[str, int]:
    """The prompt, and how many of `turns`, (what was asked before, the answer) oldest first, stand in it.

    Args:
        template: "{}" in it is replaced by what is asked; without "{}" that is the whole prompt.
        asked: last.
        turns: the oldest are left out until the prompt fits.
        fits: whether a prompt has room; it is not asked about one without turns.
    """
    last = _alone(template, asked)
    told = [f"{_alone(template, question)} {_sentence(answer)}" for question, answer in turns]
    for start in range(len(told)):
        prompt = " ".join([*told[start:], last])
        if fits(prompt):
            return prompt, len(told) - start
    return last, 0


def _alone(template: str, asked: str) -> str:
    return template.replace("{}", asked) if "{}" in template else asked


def _sentence(answer: str) -> str:
    return answer if answer.endswith(_STOPS) else f"{answer}."


@dataclass(frozen=True)
class Reply:
    """What was written to one prompt."""

    asked: str  # as it was given
    prompt: str  # what the language model read, in a conversation with the turns before
    earlier: int  # turns before that stand in the prompt
    texts: list[Text]  # best first


class Asker:
    """Turns what is asked into prompts, and has the language model write behind them.

    Args:
        write: see `Write`.
        template: "{}" in it is replaced by what is asked; without "{}" that is the whole prompt.
        chat: what was asked of an image before, and the answer, stands before what is asked next, as in the paper's examples:
            "Question: which city is this? Answer: singapore. Question: why? Answer:".
        fits: whether a prompt has room; in a conversation the oldest turns are left out until it has.
        batch_size: prompts at a time.
    """

    def __init__(self, write: Write, *, template: str, chat: bool, fits: Callable[[str], bool], batch_size: int):
        self._write, self._template, self._chat, self._fits, self._batch_size = write, template, chat, fits, batch_size

    def alone(self, asked: str) -> str:
        """The prompt of what is asked first."""
        return _alone(self._template, asked)

    def ask(self, query_BQD: Tensor, asked: Sequence[Sequence[str]]) -> list[list[Reply]]:
        """Each image's replies, in the order of what is asked of it; some images may be asked more than others."""
        replies: list[list[Reply]] = [[] for _ in asked]
        for chunk in self._chunks(asked):
            prompts = [self._prompt(text, replies[row]) for row, text in chunk]
            query_NQD = query_BQD.index_select(paddle.to_tensor([row for row, _ in chunk]))
            written = self._write(query_NQD, [prompt for prompt, _ in prompts])
            for (row, text), (prompt, earlier), texts in zip(chunk, prompts, written, strict=True):
                replies[row].append(Reply(text, prompt, earlier, texts))
        return replies

    def _chunks(self, asked: Sequence[Sequence[str]]) -> Iterator[list[tuple[int, str]]]:
        """(Image, what is asked) by batches; a conversation's next turn has to wait for the answers to the one before."""
        if self._chat:
            longest = max(map(len, asked), default=0)
            rounds = [[(row, texts[turn]) for row, texts in enumerate(asked) if turn < len(texts)] for turn in range(longest)]
        else:
            rounds = [[(row, text) for row, texts in enumerate(asked) for text in texts]]
        for pairs in rounds:
            for start in range(0, len(pairs), self._batch_size):
                yield pairs[start : start + self._batch_size]

    def _prompt(self, asked: str, before: Sequence[Reply]) -> tuple[str, int]:
        turns = [(reply.asked, reply.texts[0].text) for reply in before] if self._chat else []
        return conversation_prompt(self._template, asked, turns, self._fits)
