"""The figures of one sort of annotations of one split, from one pass over them.

N samples, T texts.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from blip2x.data.audit.counts import EXAMPLES, Finding, key_of, spread, visible
from blip2x.data.audit.given import Given
from blip2x.data.audit.texts import TextFacts
from blip2x.data.pictures import PathImage
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.data.shards import StoredImage
from blip2x.data.tokenize import clean_caption

MANY = 10  # images that have a caption in common before it counts as repeated


@dataclass(frozen=True)
class Annotations:
    """What one pass gave.

    Attributes:
        given: the samples.
        image_N: 64 bits that stand for each sample's image, by its name.
        digest: equal to another's if both have the same samples.
        figures: what audit.json holds of them.
    """

    given: Given
    image_N: np.ndarray
    digest: bytes
    figures: dict[str, Any]


class _Walk:
    """Goes over samples once, with what is counted of both sorts."""

    def __init__(self, given: Given):
        self._samples = given.samples
        self._digest = blake2b(digest_size=16)
        self._images = array("Q")
        self._groups: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[int, str, Any]]:
        """(place, name of the image, sample)."""
        for place, sample in enumerate(self._samples):
            name = sample.image.name
            texts = sample.captions if isinstance(sample, CaptionSample) else (sample.question, *sample.answers)
            # what is painted may be called otherwise in each split
            image = name if isinstance(sample.image, (PathImage, StoredImage)) else ""
            line = "\0".join((str(sample.image_id), image, *texts))
            self._digest.update(f"{line}\n".encode("utf-8", "surrogatepass"))
            self._images.append(key_of(name))
            self._groups[sample.group] += 1
            yield place, name, sample

    def annotations(self, given: Given, figures: dict[str, Any]) -> Annotations:
        """When all samples have been seen."""
        image_N = np.frombuffer(self._images, dtype=np.uint64)
        groups = {} if set(self._groups) == {""} else {"groups": dict(self._groups.most_common())}
        counts = {"samples": len(image_N), "images": len(np.unique(image_N))}
        return Annotations(given, image_N, self._digest.digest(), {**counts, **groups, **figures})


def walk_captions(given: Given, texts: TextFacts, seen: Any) -> Annotations:
    """Go over captions; `seen` is called after each sample."""
    walk, per_image, twice = _Walk(given), Counter(), Finding()
    places, keys = array("I"), array("Q")  # of each image's different captions
    for place, name, sample in walk:
        different: set[str] = set()
        for text in sample.captions:
            texts.add(text, name)
            clean = clean_caption(text)
            if clean in different:
                twice.add(image=name, text=text)
            different.add(clean)
        per_image[len(sample.captions)] += 1
        keys.extend(map(key_of, different))
        places.extend([place] * len(different))
        seen()
    different_keys, first, count = np.unique(np.frombuffer(keys, dtype=np.uint64), return_index=True, return_counts=True)
    examples = []
    for index in np.argsort(-count, kind="stable")[:EXAMPLES]:
        if count[index] >= MANY:
            captions = given.samples[places[first[index]]].captions
            text = next(text for text in captions if key_of(clean_caption(text)) == int(different_keys[index]))
            examples.append({"text": visible(text), "images": int(count[index])})
    repeated = {"count": int(count[count >= MANY].sum()), "examples": examples}
    figures = {"per_image": spread(per_image), **texts.figures(), "twice": twice.figures(), "repeated": repeated}
    return walk.annotations(given, figures)


def walk_questions(given: Given, texts: TextFacts, seen: Any) -> Annotations:
    """Go over questions; `seen` is called after each sample."""
    walk, answers, keys = _Walk(given), Counter(), array("Q")
    for _, name, sample in walk:
        texts.add(sample.question, name)
        answers[len(sample.answers)] += 1
        keys.append(key_of(f"{name}\0{' '.join(sample.question.lower().split())}"))
        seen()
    key_N = np.frombuffer(keys, dtype=np.uint64)
    different, first = np.unique(key_N, return_index=True)
    again = np.ones(len(key_N), dtype=bool)
    again[first] = False
    twice = Finding(count=len(key_N) - len(different))
    for place in np.flatnonzero(again)[:EXAMPLES]:
        sample: QuestionSample = given.samples[int(place)]
        twice.examples.append({"image": sample.image.name, "text": visible(sample.question)})
    found = walk.annotations(given, {"answers": spread(answers), **texts.figures(), "twice": twice.figures()})
    _, per_image = np.unique(found.image_N, return_counts=True)
    found.figures["per_image"] = spread(Counter(per_image.tolist()))
    return found
