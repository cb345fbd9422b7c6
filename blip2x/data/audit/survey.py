"""All figures of an audit: the texts of each split, then its pictures, then what is there twice.

N samples, P pictures of a split, O of them that were opened, K different files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Protocol, TextIO

import numpy as np

from blip2x.data.audit.alike import near_groups
from blip2x.data.audit.annotations import Annotations, walk_captions, walk_questions
from blip2x.data.audit.counts import EXAMPLES, escaped, spread, visible
from blip2x.data.audit.given import SORTS, SPLITS, Sort, files_of, read_given
from blip2x.data.audit.pictures import CHUNK, SMALL, Broken, inspect_all
from blip2x.data.audit.texts import TextFacts
from blip2x.data.samples import CaptionSample, Picture
from blip2x.data.source import Source, Split
from blip2x.data.tokenize import TextTokenizer
from blip2x.errors import UserError

_BLOCK = 10_000  # samples between two steps of a progress bar
_GROUPS, _OF_GROUP = 6, 4  # groups of pictures that look the same are shown, and how many pictures of each
_LINES = 3  # texts shown under a picture


class Progress(Protocol):
    """A progress bar."""

    def advance(self, samples: int) -> None:
        """A step of so many samples is done."""


@dataclass(frozen=True)
class Settings:
    """What is looked at, and how.

    Attributes:
        open_images: how many pictures of each split are opened, drawn by lot; None: all.
        near: bits in which hashes of near duplicates may differ.
        max_txt_len: tokens to which trainings cut texts.
        sheet: pictures of each split to show.
        processes: how many open pictures; 0: this one.
        seed: of what is drawn by lot.
        tokenizers: by the name under which lengths are reported.
        progress: opens a progress bar of (description, steps, unit).
        say: takes lines on what takes long.
    """

    open_images: int | None
    near: int
    max_txt_len: int
    sheet: int
    processes: int
    seed: int
    tokenizers: Mapping[str, TextTokenizer]
    progress: Callable[[str, int, str], AbstractContextManager[Progress]]
    say: Callable[[str], None]


@dataclass(frozen=True)
class Shown:
    """A picture to show, with lines under it."""

    picture: Picture
    lines: list[str]


@dataclass
class Survey:
    """What was found.

    Attributes:
        figures: what audit.json holds.
        sheets: split -> pictures drawn by lot.
        groups: title -> groups of pictures that are the same, a few of them.
    """

    figures: dict[str, Any]
    sheets: dict[Split, list[Shown]] = field(default_factory=dict)
    groups: dict[str, list[list[Shown]]] = field(default_factory=dict)


def survey(source: Source, settings: Settings, bad_images: TextIO) -> Survey:
    """Look all of `source` over; each missing or broken image is a line of `bad_images`.

    Raises:
        UserError: the data set has neither captions nor questions.
    """
    found, same_as, unreadable = _annotations(source, settings)
    if not found and not unreadable:
        raise UserError(f"data set {source.name!r} has neither captions nor questions to look at")
    splits = {split: [kind for (its, _), kind in found.items() if its == split] for split in SPLITS}
    pictures = {split: _Pictures(split, kinds, settings) for split, kinds in splits.items() if kinds}
    for each in pictures.values():
        each.open(settings, bad_images)
    figures: dict[str, Any] = {"data_set": source.name, "splits": {}, "across": []}
    figures |= {"same_as": same_as, "unreadable": unreadable}
    result = Survey(figures)
    same = _Same(list(pictures.values()), settings.near)
    for index, (split, each) in enumerate(pictures.items()):
        sorts = {sort: kind.figures for (its, sort), kind in found.items() if its == split}
        twice, groups = same.within(index)
        figures["splits"][split] = {"images": {**each.figures, **twice}, **sorts}
        result.groups |= groups
        result.sheets[split] = each.sheet(settings)
    for first, second in combinations(range(len(pictures)), 2):
        twice, groups = same.across(first, second)
        figures["across"].append(twice)
        result.groups |= groups
    return result


def _annotations(
    source: Source, settings: Settings
) -> tuple[dict[tuple[Split, Sort], Annotations], dict[str, str], dict[str, str]]:
    """What there is; "split sort" of what is another split's under a second name; and the error of what cannot be read."""
    found: dict[tuple[Split, Sort], Annotations] = {}
    files: dict[tuple[Split, Sort], Any] = {}
    same_as, unreadable = {}, {}
    for split in ("train", "eval", "val"):  # val last, since it may be eval
        for sort in SORTS:
            name = f"{split} {sort}"
            its_files = files_of(source, split, sort)
            twin = next((other for (other, same), known in files.items() if same == sort and known == its_files), None)
            if twin:  # reading them again would take as long, and tell nothing
                same_as[name] = f"{twin} {sort}"
                continue
            if its_files:
                files[split, sort] = its_files
            try:
                given = read_given(source, split, sort, settings.say)
            except UserError as error:
                unreadable[name] = str(error)
                continue
            if given is None:
                continue
            texts = TextFacts(settings.tokenizers, limit=settings.max_txt_len, captions=sort == "captions")
            unit = "images" if sort == "captions" else sort
            with _Ticker(settings, name, len(given.samples), unit) as ticker:
                kind = (walk_captions if sort == "captions" else walk_questions)(given, texts, ticker.tick)
            twin = next((its for (its, same), other in found.items() if same == sort and other.digest == kind.digest), None)
            if twin:
                same_as[name] = f"{twin} {sort}"
            else:
                found[split, sort] = kind
    return found, same_as, unreadable


class _Ticker:
    """Moves a progress bar on after many samples, for a bar takes longer than a sample."""

    def __init__(self, settings: Settings, description: str, total: int, unit: str):
        self._bar = settings.progress(description, -(-total // _BLOCK), unit)
        self._count = 0

    def __enter__(self) -> _Ticker:
        self._open = self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._count % _BLOCK:
            self._open.advance(self._count % _BLOCK)
        self._bar.__exit__(*error)

    def tick(self) -> None:
        """A sample is done."""
        self._count += 1
        if self._count % _BLOCK == 0:
            self._open.advance(_BLOCK)


class _Pictures:
    """The different pictures of a split, and what opening them told.

    Attributes:
        split: its name.
        key_P: 64 bits that stand for each picture's name.
        figures: what audit.json holds.
        opened_O: places among the P pictures, rising.
        content_O, shape_O, small_O: of `Facts`.
    """

    def __init__(self, split: Split, kinds: list[Annotations], settings: Settings):
        self.split, self._kinds = split, kinds
        key_N = np.concatenate([kind.image_N for kind in kinds])
        kind_N = np.repeat(np.arange(len(kinds), dtype=np.uint8), [len(kind.image_N) for kind in kinds])
        place_N = np.concatenate([np.arange(len(kind.image_N)) for kind in kinds])
        gone_N = np.concatenate([_chosen(len(kind.image_N), kind.given.missing) for kind in kinds])
        first_P = np.sort(np.unique(key_N, return_index=True)[1])  # as the samples come, so that disks read in runs
        self.key_P = key_N[first_P]
        self._kind_P, self._place_P = kind_N[first_P], place_N[first_P]
        self._gone_P = gone_N[first_P]
        self.left_out = list(dict.fromkeys(sentence for kind in kinds for sentence in kind.given.left_out))
        there_P = np.flatnonzero(~self._gone_P)
        count = len(there_P) if settings.open_images is None else min(settings.open_images, len(there_P))
        self._lot = np.random.default_rng([settings.seed, SPLITS.index(split)])
        self.opened_O = np.sort(self._lot.choice(there_P, count, replace=False)) if count < len(there_P) else there_P
        self.figures: dict[str, Any] = {"count": len(self.key_P) + len(self.left_out)}
        missing = [visible(self.picture(place).name) for place in np.flatnonzero(self._gone_P)[:EXAMPLES]]
        self.figures["missing"] = {
            "count": int(self._gone_P.sum()) + len(self.left_out),
            "examples": (missing + self.left_out)[:EXAMPLES],
        }
        self.figures["same_path"] = {"count": sum(map(_again, kinds)), "examples": []}

    def picture(self, place: int) -> Picture:
        """That of a place among the P pictures."""
        return self._sample(place).image

    def shown(self, place: int, *, texts: bool) -> Shown:
        """With its name under it, or with its texts."""
        sample = self._sample(place)
        if not texts:
            return Shown(sample.image, [f"{self.split}: {visible(sample.image.name)}"])
        if isinstance(sample, CaptionSample):
            return Shown(sample.image, [visible(text) for text in sample.captions[:_LINES]])
        return Shown(sample.image, [visible(sample.question), ", ".join(dict.fromkeys(map(visible, sample.answers)))])

    def sheet(self, settings: Settings) -> list[Shown]:
        """Pictures drawn by lot, with their texts; of those that were opened, if any were."""
        places = self.opened_O if len(self.opened_O) else np.flatnonzero(~self._gone_P)
        drawn = self._lot.choice(places, min(settings.sheet, len(places)), replace=False)
        return [self.shown(place, texts=True) for place in drawn.tolist()]

    def open(self, settings: Settings, bad_images: TextIO) -> None:
        """Look at the pictures that the lot fell upon, and write the sentences of missing and broken ones."""
        for place in np.flatnonzero(self._gone_P):
            bad_images.write(f"{self.split}: image {escaped(self.picture(place).name)} does not exist\n")
        bad_images.writelines(f"{self.split}: {escaped(sentence)}\n" for sentence in self.left_out)
        count = len(self.opened_O)
        self.content_O, self.shape_O = np.zeros((2, count), dtype=np.uint64)
        self.small_O = np.zeros((count, SMALL), dtype=np.uint8)
        sides, modes = np.zeros((2, count), dtype=np.uint32), Counter()
        flags = dict.fromkeys(("grey", "transparent", "rotated", "animated"), 0)
        good, examples, done = np.zeros(count, dtype=bool), [], 0
        with settings.progress(f"{self.split} images", -(-count // CHUNK), "images") as bar:
            for chunk in inspect_all(map(self.picture, self.opened_O.tolist()), settings.processes):
                for facts in chunk:
                    if isinstance(facts, Broken):
                        bad_images.write(f"{self.split}: {escaped(facts.sentence)}\n")
                        examples += [visible(facts.sentence)] if len(examples) < EXAMPLES else []
                    else:
                        good[done] = True
                        sides[:, done] = facts.width, facts.height
                        self.content_O[done], self.shape_O[done] = facts.content, facts.shape
                        self.small_O[done] = np.frombuffer(facts.small, dtype=np.uint8)
                        modes[facts.mode] += 1
                        for flag in flags:
                            flags[flag] += getattr(facts, flag)
                    done += 1
                bar.advance(len(chunk))
        self.figures |= {"opened": count, "broken": {"count": int(count - good.sum()), "examples": examples}}
        self.figures |= {"modes": dict(modes.most_common()), **flags}
        self.opened_O = self.opened_O[good]
        self.content_O, self.shape_O, self.small_O = self.content_O[good], self.shape_O[good], self.small_O[good]
        self._describe_sizes(sides[:, good])

    def _describe_sizes(self, sides: np.ndarray) -> None:
        """[width and height, O], pixels."""
        self.figures |= {"width": _spread_of(sides[0]), "height": _spread_of(sides[1])}
        if len(self.opened_O):
            area = sides.astype(np.uint64).prod(axis=0)
            for name, index in (("smallest", int(area.argmin())), ("largest", int(area.argmax()))):
                picture = self.picture(self.opened_O[index])
                self.figures[name] = {"image": visible(picture.name), "size": sides[:, index].tolist()}

    def _sample(self, place: int) -> Any:
        return self._kinds[self._kind_P[place]].given.samples[int(self._place_P[place])]


class _Same:
    """Which of the opened pictures are the same: by name, by file, and by what they look like."""

    def __init__(self, pictures: list[_Pictures], near: int):
        self._pictures = pictures
        counts = [len(each.opened_O) for each in pictures]
        content = np.concatenate([np.zeros(0, dtype=np.uint64), *(each.content_O for each in pictures)])
        _, first_K, file = np.unique(content, return_index=True, return_inverse=True)
        shape_K = np.concatenate([content[:0], *(each.shape_O for each in pictures)])[first_K]
        small = np.concatenate([np.zeros((0, SMALL), dtype=np.uint8), *(each.small_O for each in pictures)])
        look = near_groups(shape_K, small[first_K], near)[file]
        ends = np.cumsum([0, *counts])
        self._file = [file[start:end] for start, end in pairwise(ends)]
        self._look = [look[start:end] for start, end in pairwise(ends)]

    def within(self, index: int) -> tuple[dict[str, Any], dict[str, list[list[Shown]]]]:
        """Figures of a split, and pictures to show."""
        file, look, pictures = self._file[index], self._look[index], self._pictures[index]
        _, first = np.unique(file, return_index=True)
        found = {"same_file": (file, np.arange(len(file))), "near": (look[first], first)}
        figures, groups = {}, {}
        for name, (label, places) in found.items():
            values, count = np.unique(label, return_counts=True)
            of_label = (places[label == value][:_OF_GROUP] for value in values[count > 1][:_GROUPS])
            shown = [pictures.opened_O[group].tolist() for group in of_label]
            figures[name] = {
                "count": int((count - 1).sum()),
                "examples": [[visible(pictures.picture(place).name) for place in group] for group in shown[:EXAMPLES]],
            }
            if shown:
                title = f"{pictures.split}: {'the same file' if name == 'same_file' else 'nearly the same'}"
                groups[title] = [[pictures.shown(place, texts=False) for place in group] for group in shown]
        return figures, groups

    def across(self, first: int, second: int) -> tuple[dict[str, Any], dict[str, list[list[Shown]]]]:
        """How many pictures of the second split are in the first, too, each counted once, and pictures to show."""
        one, other = self._pictures[first], self._pictures[second]
        by_path = np.isin(other.key_P, one.key_P, assume_unique=True)
        named = by_path[other.opened_O]
        filed = np.isin(self._file[second], self._file[first]) & ~named
        looks = np.isin(self._look[second], self._look[first]) & ~named & ~filed
        figures: dict[str, Any] = {"splits": [one.split, other.split], "images": len(other.key_P)}
        figures["opened"] = [len(one.opened_O), len(other.opened_O)]
        places = np.flatnonzero(by_path)
        names = [[visible(other.picture(place).name)] for place in places[:EXAMPLES]]
        figures["same_path"] = {"count": len(places), "examples": names}
        groups = {}
        for name, which, labels in (("same_file", filed, self._file), ("near", looks, self._look)):
            pairs = []
            for place in np.flatnonzero(which)[:_GROUPS]:
                twin = int(np.flatnonzero(labels[first] == labels[second][place])[0])
                pairs.append((int(one.opened_O[twin]), int(other.opened_O[place])))
            examples = [[visible(one.picture(a).name), visible(other.picture(b).name)] for a, b in pairs[:EXAMPLES]]
            figures[name] = {"count": int(which.sum()), "examples": examples}
            if pairs:
                title = f"{one.split} and {other.split}: {'the same file' if name == 'same_file' else 'nearly the same'}"
                groups[title] = [[one.shown(a, texts=False), other.shown(b, texts=False)] for a, b in pairs]
        return figures, groups


def _chosen(count: int, places: np.ndarray) -> np.ndarray:
    chosen = np.zeros(count, dtype=bool)
    chosen[places] = True
    return chosen


def _again(kind: Annotations) -> int:
    """Entries of a caption file that name an image which another one names, as two parts of a mixture may."""
    return len(kind.image_N) - kind.figures["images"] if "repeated" in kind.figures else 0


def _spread_of(values: np.ndarray) -> dict[str, Any]:
    different, count = np.unique(values, return_counts=True)
    return spread(Counter(dict(zip(different.tolist(), count.tolist(), strict=True))))
