"""What values of a config have to keep, said in one sentence where one does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from blip2x.errors import UserError

Rule = tuple[str, Callable[[Any], bool]]  # ("at least 1", whether a number is)

AT_LEAST_1: Rule = ("at least 1", lambda value: value >= 1)
AT_LEAST_3: Rule = ("at least 3 (a first token, a word, an end)", lambda value: value >= 3)  # tokens of a text
NOT_NEGATIVE: Rule = ("at least 0 and finite", lambda value: 0 <= value < math.inf)  # nan is not, either
POSITIVE: Rule = ("above 0 and finite", lambda value: 0 < value < math.inf)
SHARE: Rule = ("at least 0 and below 1", lambda value: 0 <= value < 1)


def numbers(prefix: str, cfg: Any, rule: Rule, *names: str) -> None:
    """Hold the numbers `names` of `cfg` to `rule`; null, where the schema allows it, is no number."""
    what, holds = rule
    for name in names:
        value = getattr(cfg, name)
        if value is not None and not holds(value):
            raise UserError(f"{f'{prefix}.{name}'.lstrip('.')} must be {what}, got {value}")


def choices(key: str, values: list, known: tuple) -> None:
    """Raise `UserError` where one of `values` is not `known`."""
    for value in values:
        if value not in known:
            raise UserError(f"{key}: unknown value {value!r}; known: {', '.join(map(str, known))}")
