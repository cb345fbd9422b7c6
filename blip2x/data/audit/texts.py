"""Lengths of texts, and characters that do not belong into them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

from blip2x.data.audit.counts import Finding, spread
from blip2x.data.tokenize import TextTokenizer, clean_caption

_TOGETHER = 4096  # texts that are tokenized in one call
_PICTOGRAPHS = "\u2190"  # arrows, boxes, emoji; before them are the degree, copyright and trade mark signs
_LATIN_END = "\u0250"  # behind it letters have scripts of their own; before it are accents, and signs such as the micro sign

CONTROL, REPLACED, MOJIBAKE = "control characters", "replacement characters", "mojibake"
INVISIBLE, UNASSIGNED, BLANKS, SYMBOLS = "invisible characters", "unassigned characters", "unusual blanks", "symbols"
HTML, ADDRESS = "HTML", "web addresses"
_PATTERNS = {
    CONTROL: re.compile(r"[\x00-\x1f\x7f-\x9f]"),
    HTML: re.compile(r"<[a-z/!][^<>]{0,200}>|&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});", re.IGNORECASE),
    ADDRESS: re.compile(r"https?://|www\.\w", re.IGNORECASE),
}
# UTF-8 bytes that were read as Latin-1 or Windows-1252: a first byte (as a letter with an accent) and what may follow it
_FOLLOWING = "\x80-\xbf" + re.escape(bytes(sorted({*range(0x80, 0xC0)} - {0x81, 0x8D, 0x8F, 0x90, 0x9D})).decode("cp1252"))
_MAYBE_MOJIBAKE = re.compile(f"[\xc2-\xf4][{_FOLLOWING}]{{1,3}}")


class TextFacts:
    """What is counted of texts that come one after the other; none is kept but a few examples.

    Args:
        tokenizers: by the name under which lengths in tokens are reported.
        limit: tokens of the longest text that is not cut (`max_txt_len`), with what begins and ends a text.
        captions: the texts are captions, which trainings clean before they see them.
    """

    def __init__(self, tokenizers: Mapping[str, TextTokenizer], *, limit: int, captions: bool):
        self.count = 0
        self._empty, self._wordless, self._odd = Finding(), Finding(), defaultdict(Finding)
        self._tokenizers, self._limit, self._captions = tokenizers, limit, captions
        self._words: Counter[int] = Counter()
        self._tokens: dict[str, Counter[int]] = {name: Counter() for name in tokenizers}
        self._waiting: list[str] = []

    def add(self, text: str, image: str) -> None:
        """Count `text`, which belongs to the image of that name."""
        self.count += 1
        seen = clean_caption(text) if self._captions else text
        self._words[len(text.split())] += 1
        if not seen.strip():
            self._empty.add(image=image, text=text)
        elif not any(map(str.isalnum, text)):
            self._wordless.add(image=image, text=text)
        for kind in odd_kinds(text):
            self._odd[kind].add(image=image, text=text)
        if self._tokenizers:
            self._waiting.append(seen)
            if len(self._waiting) == _TOGETHER:
                self._tokenize()

    def figures(self) -> dict[str, Any]:
        """All that was counted, for JSON."""
        self._tokenize()
        tokens = {}
        for name, lengths in self._tokens.items():
            cut = sum(count for length, count in lengths.items() if length > self._limit)
            tokens[name] = {**spread(lengths), "limit": self._limit, "cut": cut}
        odd = sorted(self._odd.items(), key=lambda item: (-item[1].count, item[0]))
        return {
            "texts": self.count,
            "words": spread(self._words),
            "tokens": tokens,
            "empty": self._empty.figures(),
            "wordless": self._wordless.figures(),
            "odd": {kind: finding.figures() for kind, finding in odd},
        }

    def _tokenize(self) -> None:
        texts, self._waiting = [text.strip() for text in self._waiting], []
        for name, tokenizer in self._tokenizers.items():
            ends = 1 + (tokenizer.bos_id is not None)
            encoded = tokenizer.tokenizer.encode_batch(texts, add_special_tokens=False)
            self._tokens[name].update(len(one.ids) + ends for one in encoded)


def odd_kinds(text: str) -> set[str]:
    """What is odd about a text: kinds of characters, "HTML", "web addresses", or letters of a script that is not Latin."""
    found = {kind for kind, pattern in _PATTERNS.items() if pattern.search(text)}
    if not text.isascii():
        found |= {kind for kind in map(_odd_kind, set(text)) if kind}
        if any(map(_was_utf8, _MAYBE_MOJIBAKE.findall(text))):
            found.add(MOJIBAKE)
    return found


@cache
def _odd_kind(character: str) -> str | None:
    """Of one character; None: nothing is odd about it."""
    category = unicodedata.category(character)
    if character == "\ufffd":
        return REPLACED
    if category in ("Cf", "Cn", "Co", "Cs"):
        return INVISIBLE if category == "Cf" else UNASSIGNED
    if category[0] == "Z" and character != " ":
        return BLANKS
    if category == "So" and character >= _PICTOGRAPHS:
        return SYMBOLS
    script = unicodedata.name(character, "UNKNOWN").split()[0].split("-")[0]
    if category[0] != "L" or character < _LATIN_END or script in ("LATIN", "MODIFIER"):
        return None
    return f"{script if script == 'CJK' else script.capitalize()} letters"


def _was_utf8(text: str) -> bool:
    for encoding in ("cp1252", "latin-1"):
        try:
            text.encode(encoding).decode("utf-8")
            return True
        except UnicodeError:
            continue
    return False
