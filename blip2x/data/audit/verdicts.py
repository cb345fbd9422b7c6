"""From figures to verdicts: what is fine, what should be looked at, what is broken, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

_CUT_SHARE = 0.01  # of the texts, above which cutting them off is worth a look
_REPEATED_SHARE = 0.1  # of the captions, above which those that many images share are worth a look

_OPEN = "task.open_images=all opens them"

Figures = dict[str, Any]


class Verdict(Enum):
    """How bad it is."""

    fine = "fine"
    look = "look"  # may be as it should be; somebody has to see it
    broken = "broken"  # stops a training, or makes scores worthless


@dataclass(frozen=True)
class Line:
    """A check and its outcome."""

    where: str  # a split, two splits, or a split and a sort
    check: str
    verdict: Verdict
    found: str
    advice: str = ""  # "" where all is fine


def judge(figures: Figures) -> list[Line]:
    """A line per check, in the order of `figures`, as `Survey` has them."""
    lines = [
        Line(where, "annotations", Verdict.broken, sentence, "repair or remove the file, or unset its key")
        for where, sentence in figures["unreadable"].items()
    ]
    for split, found in figures["splits"].items():
        lines += _images(split, found["images"])
        for sort in ("captions", "questions"):
            if sort in found:
                lines += _texts(f"{split} {sort}", sort, found[sort])
    for found in figures["across"]:
        lines.append(_leak(found))
    return lines


def _images(split: str, found: Figures) -> Iterator[Line]:
    missing, broken = found["missing"]["count"], found["broken"]["count"]
    there, opened = found["count"] - missing, found["opened"]
    yield _line(
        (split, "images are there"),
        Verdict.broken if missing else Verdict.fine,
        f"{missing:,} of {found['count']:,} missing" if missing else f"{found['count']:,} images",
        "fetch them (task=prepare), or leave them out with dataset.on_bad_image=skip; bad_images.txt names them",
    )
    if not opened:
        advice = _OPEN if there else "see what is missing"
        for check in ("images open", "each image once"):
            yield Line(split, check, Verdict.look, f"none of {there:,} opened", advice)
        return
    some = "" if opened == there else f" (of {there:,}, drawn by lot)"
    yield _line(
        (split, "images open"),
        Verdict.broken if broken else Verdict.fine,
        f"{broken:,} of {opened:,} opened{some} cannot be used" if broken else f"{opened:,} opened{some}",
        "replace them, or leave them out with dataset.on_bad_image=skip; bad_images.txt says what is wrong with each",
    )
    copies = _counted(found, {"same_path": "in several entries", "same_file": "copies of files", "near": "nearly copies"})
    certain = found["same_path"]["count"] or found["same_file"]["count"]
    advice = ["copies count more than once in training and in scores; remove them if that is not meant"] if certain else []
    if found["near"]["count"]:
        advice.append("see near copies in audit.html: pictures that differ in small things may look alike, and should stay")
    yield _line(
        (split, "each image once"),
        Verdict.look if copies else Verdict.fine,
        copies or f"no copies{some and ' among those opened'}",
        "; ".join(advice),
    )


def _texts(where: str, sort: str, found: Figures) -> Iterator[Line]:
    count, words, empty, wordless = found["texts"], found["words"], found["empty"]["count"], found["wordless"]["count"]
    stops = empty and where == "train captions"
    lengths = f"{words['min']} to {words['max']} words" if count else "no texts"
    yield _line(
        (where, "texts are not empty"),
        Verdict.broken if stops else Verdict.look if empty else Verdict.fine,
        f"{empty:,} of {count:,} empty{' but for punctuation' if sort == 'captions' else ''}" if empty else f"{count:,} texts",
        "give them a text or remove the entries" + ("; no training starts with them" if stops else ""),
    )
    yield _line(
        (where, "texts have words"),
        Verdict.look if wordless else Verdict.fine,
        f"{wordless:,} of {count:,} without a letter or digit" if wordless else lengths,
        "see the examples; give them a text or remove the entries",
    )
    for name, tokens in found["tokens"].items():
        share = tokens["cut"] / count if count else 0
        yield _line(
            (where, f"length for the {name}"),
            Verdict.look if share > _CUT_SHARE else Verdict.fine,
            f"{100 * share:.3g} % over {tokens['limit']} tokens; the longest has {tokens['max']}",
            "raise the training's task.max_txt_len, or accept that their ends are cut off",
        )
    odd = [f"{kind}: {finding['count']:,}" for kind, finding in found["odd"].items()]
    yield _line(
        (where, "characters"),
        Verdict.look if odd else Verdict.fine,
        ", ".join(odd) or "nothing odd",
        "see the examples; repair the encoding, or remove what no caption should have",
    )
    twice = found["twice"]["count"]
    what = "given twice for an image" if sort == "captions" else "asked twice about an image"
    yield _line(
        (where, "each text once per image"),
        Verdict.look if twice else Verdict.fine,
        f"{what}: {twice:,}" if twice else "no repetition",
        "remove the copies",
    )
    if sort == "captions":
        repeated = found["repeated"]["count"]
        share = repeated / count if count else 0
        yield _line(
            (where, "captions tell images apart"),
            Verdict.look if share > _REPEATED_SHARE else Verdict.fine,
            f"{100 * share:.3g} % are shared by ten or more images",
            "contrast (ITC) treats images with one caption as different; see which captions these are",
        )


def _leak(found: Figures) -> Line:
    one, other = found["splits"]
    leaks = _counted(found, {"same_path": "by name", "same_file": "by file", "near": "by look"})
    what, opened = (f"{one} and {other}", "no image in both"), " and ".join(f"{count:,}" for count in found["opened"])
    if not leaks and not all(found["opened"]):
        return Line(*what, Verdict.look, "none by name, and too few opened to tell", _OPEN)
    trained = one == "train"
    certain = trained and (found["same_path"]["count"] or found["same_file"]["count"])
    advice = f"remove them from train; scores on {other} are too good with them"
    if not certain:
        advice = f"see them in audit.html; where both show the same, {advice}"
    return _line(
        what,
        Verdict.broken if certain else Verdict.look if leaks else Verdict.fine,
        f"of the {found['images']:,} images of {other}, {leaks}" if leaks else f"none among {opened} opened",
        advice if trained else "trainings choose by what evaluations report; fine where a data set has no val of its own",
    )


def _counted(found: Figures, words: dict[str, str]) -> str:
    return ", ".join(f"{word}: {found[key]['count']:,}" for key, word in words.items() if found[key]["count"])


def _line(what: tuple[str, str], verdict: Verdict, found: str, advice: str) -> Line:
    return Line(*what, verdict, found, "" if verdict is Verdict.fine else advice)
