"""Words in the manner of the Penn Treebank, as CoreNLP 3.4.1's PTBTokenizer finds them in captions, without Java.

Written after what that program answers to the captions of COCO and to made-up ones. Not followed are its rules for phone
numbers, for mark-up with blanks in it and for scripts other than Latin.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

# The period behind these belongs to them.
_ABBREVIATIONS = (
    "adm al ala alex apr ariz assn aug ave bldg blvd brig bros calif capt cf cmdr co col colo conn corp cos cpl ct dec dept "
    "dr drs est etc ext feb fla fri ft ga gen gov hon inc ind intl jan jos jr jul jun kan ky lt ltd maj mar md messrs mfg "
    "mich minn mlle mme mo mon mont mr mrs ms mt natl neb nev nov oct okla penn pfc ph ph.d pres prof pvt rd rep rev rt sen "
    "sep sept sgt sq sr st ste supt tel tenn thu thurs treas tue tues univ va vs vt wed wis wm wyo"
)
_CAPITALISED_ABBREVIATIONS = "ark del ill la mass miss ore pa tex wash"  # words like others in lower case
_ABBREVIATIONS_OF_NUMBERS = "art ca fig figs no nos op pp prop"  # only before a number

# A single letter with a period is an initial, but ends a sentence before one of these: "plan b. The man".
_SENTENCE_STARTS = (
    "a about according additionally after an as at but earlier he her here however if in it last many more mr. ms. now once "
    "one other our she since so some such that the their then there these they this we what when while yet you"
)

_STARTS = frozenset(_SENTENCE_STARTS.split())

_TWO_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "lemme": "lem me",
    "gimme": "gim me",
    "wanna": "wan na",
}

_SHORTENED = (
    "o'clock ma'am ne'er e'er o'er s'mores cap'n c'mon c'est ev'ry li'l nat'l somethin' ol' dunkin' 'em 'til 'till 'cause"
)


def _any_of(words: str) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(words.split(), key=len, reverse=True))) + ")"


_L, _W = r"[^\W\d_]", r"[^\W_]"  # a letter; a letter or digit
_PARTS = rf"{_W}+(?:[-_/]{_W}+)*"
_CLITIC = rf"'(?:ll|re|ve|[sdm])(?!{_L})"

# The longest match is the next token or, where the pattern has a group, the group: what follows it only tells what it is.
_PATTERNS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_L}{_W}*(?:[.!?]{_L}{_W}*)*",
        _PARTS,  # t-shirt, 1/2, and/or
        rf"{_W}+(?:[.,]{_W}+)*[.,]?-{_PARTS}",  # U.S.-based, 1.5-inch; also black,white-and-grey
        rf"{_W}+(?:[-_]{_W}+)*\.(?=[,;:])",  # any word has a period before a comma
        r"[-+]?(?:\d*(?:[.:,]\d+)+|\d+)",  # -1, 1,000.5, 10:30
        rf"[a-z](?:\.[a-z])*\.(?!{_L})",  # initials
        r"([a-z])\. A",
        rf"{_any_of(_ABBREVIATIONS)}\.",
        rf"(?-i:(?=[A-Z])){_any_of(_CAPITALISED_ABBREVIATIONS)}\.",
        rf"{_any_of(_ABBREVIATIONS_OF_NUMBERS)}\.(?= ?\d)",
        rf"({_L}+)n['`]t",
        "n['`]t",
        rf"({_PARTS}){_CLITIC}",
        rf"(?<!'){_CLITIC}",
        rf"('t)(?:is|was)(?:n't)?(?!{_W})",
        rf"{_any_of(_SHORTENED)}(?!{_W})",
        "'n(?:'|$|(?= ))",  # rock 'n' roll, fish 'n chips
        rf"(?-i:[A-HJ-XZ]|[dlon])'{_L}{{2,}}",  # O'Hare, d'oeuvre
        rf"{_L}+[aeiou]'[aeiou]{_L}*",  # Xi'an
        rf"[djl]'|y'(?={_L})",  # y'all
        r"'\d(?:\d|0s)(?![\w'])",  # '47, '80s
        r"(?-i:[A-Z]+(?:[&+][A-Z]+)+)",  # R&B
        r"(?-i:[A-Z]+)\$",  # US$
        r"c\+\+|[cf]\#",
        r"https?://[^\s\"<>|(){}]+",
        rf"{_W}+(?:[-.]{_W}+)*\.(?:com|net|org|edu)/[^\s\"<>|(){{}}]*[^\s\"<>|(){{}}.!?,;:]",
        rf"{_W}[\w.-]*@{_W}+(?:[-.]{_W}+)*",
        rf"@{_L}\w*",
        rf"\#{_L}+",
        rf"</?{_L}[^<>]*>",
        "&(?:amp|quot|lt|gt|apos);",
        rf"[<>]?[:;=](?:'?-?[]()[|DP3]|o[()]|-?(?-i:O))(?!{_W})",  # :-)
        r"[-^<>]_[-^<>]",
        r"\.{3,}|-{2,}|[!?]+|\*+|_+|\#+|@+|>>|<<",
        ".",
    )
]

_WRITTEN = {  # as Java's program writes what it finds, so that the same marks are left out afterwards
    **_TWO_WORDS,
    **dict.fromkeys('"“”', "''"),
    **dict.fromkeys(("–", "—", "---", "----"), "--"),  # noqa: RUF001
    "…": "...",
    "€": "$",
    "£": "#",
    "¢": "cents",
    "&amp;": "&",
    "&quot;": "''",
    "&lt;": "<",
    "&gt;": ">",
    "&apos;": "'",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_BEFOREHAND = str.maketrans({"’": "'", "‘": "'", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "})  # noqa: RUF001


def tokenize(texts: Sequence[str]) -> list[str]:
    """Each text in lower case with a blank between its tokens, punctuation included.

    As in Java's program, the first word of the next text tells whether a single letter with a period at the end is an initial.
    """
    lines = []
    following = ""
    for text in reversed(texts):
        tokens = []
        for chunk in reversed(text.translate(_BEFOREHAND).split()):
            tokens.append(_tokens(chunk, _sign(following) if chunk.endswith(".") else ""))
            following = chunk
        lines.append(" ".join(filter(None, reversed(tokens))))
    return lines[::-1]


def words(line: str) -> str:
    """A tokenized text without its punctuation, as COCO's evaluation leaves that out."""
    return " ".join(token for token in line.split() if token not in PUNCTUATIONS)


def _sign(chunk: str) -> str:
    """What stands for the chunk that follows, as far as the patterns look at it."""
    if chunk[:1].isupper() and chunk.lower() in _STARTS:
        return " A"
    return " 0" if chunk[:1].isdigit() else ""


@lru_cache(maxsize=100_000)
def _tokens(chunk: str, following: str) -> str:
    text, tokens, start = chunk + following, [], 0
    while start < len(chunk):
        match = max((found for p in _PATTERNS if (found := p.match(text, start))), key=lambda found: found.end())
        group = match.lastindex or 0
        start = match.end(group)
        token = match[group].lower()
        if token.startswith("..."):
            token = "..."
        if token[0] <= "\uffff":  # beyond lie emoji, which are left out
            tokens.append(_WRITTEN.get(token) or token.replace("(", "-lrb-").replace(")", "-rrb-"))
    return " ".join(tokens)
