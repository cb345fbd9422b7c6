"""What the language model is asked, of which image, and with which turns before."""

from __future__ import annotations

import paddle
import pytest

from blip2x.models.prefix import SharedQueries
from blip2x.tasks.common.captioning import Text
from blip2x.tasks.common.conversation import Asker

QUERY = paddle.to_tensor([[[10.0]], [[20.0]], [[30.0]]])  # [B, Q, D], an image's number in each


def share(query_BQD):
    return SharedQueries(query_BQD, "what was read ahead")


@pytest.fixture
def asking():
    """`asking(chat, fits, batch_size)` -> (an Asker, the calls of its language model); answers name image and call."""
    calls = []

    def write(queries, images, prompts):
        numbers = queries.query_IQD[:, 0, 0].astype("int64").numpy()[images].tolist()
        calls.append(list(zip(numbers, prompts, strict=True)))
        return [[Text(f"{number}-{len(calls)}", -1.0), Text("other", -2.0)] for number in numbers]

    def make(*, chat=False, template="Q: {} A:", fits=lambda prompt: True, batch_size=2):
        return Asker(share, write, template=template, chat=chat, fits=fits, batch_size=batch_size), calls

    return make


def test_each_prompt_by_itself_in_full_batches(asking):
    asker, calls = asking()
    replies = asker.ask(QUERY, [["a?", "b?"], ["c?"], ["a?", "d?"]])
    assert calls == [[(10, "Q: a? A:"), (10, "Q: b? A:")], [(20, "Q: c? A:"), (30, "Q: a? A:")], [(30, "Q: d? A:")]]
    assert [[(r.asked, r.prompt, r.earlier, r.texts[0].text) for r in own] for own in replies] == [
        [("a?", "Q: a? A:", 0, "10-1"), ("b?", "Q: b? A:", 0, "10-1")],
        [("c?", "Q: c? A:", 0, "20-2")],
        [("a?", "Q: a? A:", 0, "30-2"), ("d?", "Q: d? A:", 0, "30-3")],
    ]


def test_in_a_conversation_each_question_follows_the_answers(asking):
    asker, calls = asking(chat=True)
    replies = asker.ask(QUERY, [["a?", "b?", "c?"], ["d?"], ["e?", "f?"]])
    assert calls == [
        [(10, "Q: a? A:"), (20, "Q: d? A:")],
        [(30, "Q: e? A:")],
        [(10, "Q: a? A: 10-1. Q: b? A:"), (30, "Q: e? A: 30-2. Q: f? A:")],
        [(10, "Q: a? A: 10-1. Q: b? A: 10-3. Q: c? A:")],
    ]
    assert [[reply.earlier for reply in own] for own in replies] == [[0, 1, 2], [0], [0, 1]]


def test_the_oldest_turns_are_left_out_for_want_of_room(asking):
    asker, calls = asking(chat=True, fits=lambda prompt: prompt.count("Q:") < 3)
    (replies,) = asker.ask(QUERY[:1], [["a?", "b?", "c?", "d?"]])
    assert [prompt for call in calls for _, prompt in call][2:] == ["Q: b? A: 10-2. Q: c? A:", "Q: c? A: 10-3. Q: d? A:"]
    assert [reply.earlier for reply in replies] == [0, 1, 1, 1]


def test_without_a_place_for_them_prompts_stay_as_they_are(asking):
    asker, calls = asking(template="")
    asker.ask(QUERY[:1], [["a photo of", "{} braces"]])
    assert [prompt for call in calls for _, prompt in call] == ["{} braces", "a photo of"]  # the shorter first


@pytest.mark.parametrize(("asked", "ahead"), [([["a?"], ["b?"], ["c?"]], False), ([["a?"], ["b?", "d?"], ["c?"]], True)])
def test_queries_are_read_ahead_where_an_image_is_asked_more_than_once(asked, ahead):
    read = []

    def write(queries, images, prompts):
        read.append(queries.read is not None)
        return [[Text("", -1.0)] for _ in prompts]

    Asker(share, write, template="", chat=False, fits=lambda prompt: True, batch_size=9).ask(QUERY, asked)
    assert read == [ahead]
