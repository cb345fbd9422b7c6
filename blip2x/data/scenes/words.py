"""What can be said and asked about a scene. Every caption names every digit, so that it tells scenes apart."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blip2x.data.scenes.scene import PlacedDigit, Scene, relations

NUMBERS = ("zero", "one", "two", "three")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def _name(placed: PlacedDigit, article: str = "a") -> str:
    if article == "a" and placed.colour[0] in "aeiou":
        article = "an"
    return f"{article} {placed.colour} {placed.digit}"


def _relation(a: PlacedDigit, b: PlacedDigit, rng: random.Random) -> str:
    """The relation along the longer axis: what a person would say first."""
    distances = relations(a, b)
    longest = max(distances.values())
    return rng.choice([relation for relation, distance in distances.items() if distance == longest])


def _list(order: Sequence[PlacedDigit], rng: random.Random) -> str:
    names = [_name(placed) for placed in order]
    return " and ".join([" , ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _counted(order: Sequence[PlacedDigit], rng: random.Random) -> str:
    return f"{NUMBERS[len(order)]} {'digit' if len(order) == 1 else 'digits'} : {_list(order, rng)}"


def _related(order: Sequence[PlacedDigit], rng: random.Random) -> str:
    first, *others = order
    return f"{_name(first)} " + " and ".join(f"{_relation(first, other, rng)} {_name(other)}" for other in others)


def _single(order: Sequence[PlacedDigit], rng: random.Random) -> str:
    return f"a single {order[0].colour} {order[0].digit}"


def _in_colour(order: Sequence[PlacedDigit], rng: random.Random) -> str:
    return f"a {order[0].digit} in {order[0].colour}"


Template = Callable[[Sequence[PlacedDigit], random.Random], str]
_OF_ONE: tuple[Template, ...] = (_list, _counted, _single, _in_colour)
_OF_MORE: tuple[Template, ...] = (_list, _counted, _related)


def captions(scene: Scene, count: int, rng: random.Random) -> tuple[str, ...]:
    """Up to `count` different captions, through all templates in turn; the order of mention is drawn by lot."""
    templates = _OF_ONE if len(scene.digits) == 1 else _OF_MORE
    templates = rng.sample(templates, len(templates))
    found: dict[str, None] = {}
    for attempt in range(8 * count):  # few scenes have as many captions as asked for: stop trying at some point
        caption = templates[attempt % len(templates)](rng.sample(scene.digits, len(scene.digits)), rng)
        found.setdefault(caption)
        if len(found) == count:
            break
    return tuple(found)


@dataclass(frozen=True)
class SceneQuestion:
    """A question with its one right answer."""

    question: str
    answer: str
    question_type: str  # digit | colour | count | spatial digit | spatial colour
    stated_by: tuple[tuple[str, str], ...] = ()  # captions with one of these (beginning, part) state the answer; (): all do

    def is_answered_by(self, caption: str) -> bool:
        """Whether a reader of `caption` can answer."""
        stated = [caption.startswith(beginning) and part in caption for beginning, part in self.stated_by]
        return any(stated) or not stated

    @property
    def answer_type(self) -> str:
        """As the VQA data sets sort answers."""
        return "other" if "colour" in self.question_type else "number"


def questions(scene: Scene, count: int, rng: random.Random, known: Sequence[str] | None = None) -> list[SceneQuestion]:
    """Up to `count` different questions, as many types as possible; with `known`, only those that these captions answer."""
    pools = [rng.sample(pool, len(pool)) for pool in _all_questions(scene, rng)]
    if known is not None:
        pools = [[asked for asked in pool if any(map(asked.is_answered_by, known))] for pool in pools]
    rng.shuffle(pools)
    turns = [pool[turn] for turn in range(max(map(len, pools))) for pool in pools if turn < len(pool)]
    return turns[:count]


def _all_questions(scene: Scene, rng: random.Random) -> list[list[SceneQuestion]]:
    """Questions that have exactly one answer, a list per type."""
    digit = [SceneQuestion(f"which digit is {p.colour} ?", str(p.digit), "digit") for p in scene.digits]
    colour = [SceneQuestion(f"what colour is the {p.digit} ?", p.colour, "colour") for p in scene.digits]
    count = [SceneQuestion("how many digits are there ?", NUMBERS[len(scene.digits)], "count")]
    spatial_digit, spatial_colour = [], []
    for anchor in scene.digits:
        for relation, inverse in INVERSE.items():
            there = [p for p in scene.digits if p is not anchor and relation in relations(p, anchor)]
            if len(there) != 1:
                continue
            other, name = there[0], rng.choice([f"the {anchor.digit}", _name(anchor, "the")])
            stated_by = ((_name(other), f"{relation} {_name(anchor)}"), (_name(anchor), f"{inverse} {_name(other)}"))
            spatial_digit.append(
                SceneQuestion(f"which digit is {relation} {name} ?", str(other.digit), "spatial digit", stated_by)
            )
            spatial_colour.append(
                SceneQuestion(f"what colour is the digit {relation} {name} ?", other.colour, "spatial colour", stated_by)
            )
    return [digit, colour, count, spatial_digit, spatial_colour]


def document(scene: Scene, *, max_captions: int, max_questions: int, rng: random.Random) -> str:
    """Lines about one scene for a language model: captions that agree, then questions that they answer."""
    known = captions(scene, rng.randint(1, max_captions), rng)
    asked = questions(scene, max_questions, rng, known)
    return "\n".join([*known, *(f"question: {q.question} short answer: {q.answer}" for q in asked)])
