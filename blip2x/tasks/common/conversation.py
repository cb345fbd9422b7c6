"""Several prompts about each of several images, which are encoded once: each by itself, or as one conversation per image.

B images, Q queries, D width of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paddle import Tensor

from blip2x.config.model import OptConfig, T5Config
from blip2x.models.prefix import SharedQueries
from blip2x.tasks.common.captioning import Text

# images' queries, the image of each of N prompts, and these -> each prompt's texts, best first
Write = Callable[[SharedQueries, list[int], list[str]], list[list[Text]]]
Share = Callable[[Tensor], SharedQueries]
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
        share: the language model's, for images of which some are asked more than once.
        write: see `Write`.
        template: "{}" in it is replaced by what is asked; without "{}" that is the whole prompt.
        chat: what was asked of an image before, and the answer, stands before what is asked next, as in the paper's examples:
            "Question: which city is this? Answer: singapore. Question: why? Answer:".
        fits: whether a prompt has room; in a conversation the oldest turns are left out until it has.
        batch_size: prompts at a time.
    """

    def __init__(self, share: Share, write: Write, *, template: str, chat: bool, fits: Callable[[str], bool], batch_size: int):
        self._share, self._write = share, write
        self._template, self._chat, self._fits, self._batch_size = template, chat, fits, batch_size

    def alone(self, asked: str) -> str:
        """The prompt of what is asked first."""
        return _alone(self._template, asked)

    def ask(self, query_BQD: Tensor, asked: Sequence[Sequence[str]]) -> list[list[Reply]]:
        """Each image's replies, in the order of what is asked of it; some images may be asked more than others."""
        several = any(len(own) > 1 for own in asked)  # or else there is nothing to share
        queries = self._share(query_BQD) if several else SharedQueries(query_BQD, None)
        found: dict[tuple[int, int], Reply] = {}
        for turns in self._rounds(asked):
            prompts = {}
            for row, turn in turns:
                before = [found[row, earlier] for earlier in range(turn)] if self._chat else []
                prompts[row, turn] = self._prompt(asked[row][turn], before)
            # those of about one length together, so that little is read that is padding only
            by_length = sorted(turns, key=lambda key: len(prompts[key][0]))
            for start in range(0, len(by_length), self._batch_size):
                chunk = by_length[start : start + self._batch_size]
                written = self._write(queries, [row for row, _ in chunk], [prompts[key][0] for key in chunk])
                for (row, turn), texts in zip(chunk, written, strict=True):
                    found[row, turn] = Reply(asked[row][turn], *prompts[row, turn], texts)
        return [[found[row, turn] for turn in range(len(texts))] for row, texts in enumerate(asked)]

    def _rounds(self, asked: Sequence[Sequence[str]]) -> list[list[tuple[int, int]]]:
        """(Image, number of what is asked of it); a conversation's next turn has to wait for the answers to the one before."""
        if not self._chat:
            return [[(row, turn) for row, texts in enumerate(asked) for turn in range(len(texts))]]
        longest = max(map(len, asked), default=0)
        return [[(row, turn) for row, texts in enumerate(asked) if turn < len(texts)] for turn in range(longest)]

    def _prompt(self, asked: str, before: Sequence[Reply]) -> tuple[str, int]:
        turns = [(reply.asked, reply.texts[0].text) for reply in before]
        return conversation_prompt(self._template, asked, turns, self._fits)
