"""Several prompts about each of several images, which are encoded once: each by itself, or as one conversation per image.

B images, Q queries, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from blip2x.tasks.common.captioning import Text

Write = Callable[[Tensor, list[str]], list[list[Text]]]  # query_NQD, N prompts -> each prompt's texts, best first
_STOPS = (".", "!", "?")


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
        return self._template.replace("{}", asked) if "{}" in self._template else asked

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
        """The prompt, and how many turns before stand in it."""
        last = self.alone(asked)
        turns = [f"{self.alone(reply.asked)} {_sentence(reply.texts[0].text)}" for reply in before] if self._chat else []
        for start in range(len(turns)):
            prompt = " ".join([*turns[start:], last])
            if self._fits(prompt):
                return prompt, len(turns) - start
        return last, 0


def _sentence(answer: str) -> str:
    return answer if answer.endswith(_STOPS) else f"{answer}."
