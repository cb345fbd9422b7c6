"""Caption metrics, by the scorers of pycocoevalcap: BLEU, METEOR, ROUGE-L and CIDEr (CIDEr-D, as in COCO's evaluation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from blip2x.errors import UserError
from blip2x.metrics.java import meteor_scores, ptb_tokenize

Words = dict[int, list[str]]  # image id -> tokenized captions


@dataclass(frozen=True)
class CaptionScores:
    """What came out; the papers print 100 times these numbers.

    Attributes:
        scores: metric -> value for the whole set: BLEU-1 to BLEU-4, METEOR, ROUGE_L (0 to 1) and CIDEr (0 to 10).
        per_image: metric -> image id -> value. CIDEr's weighs words by how rare they are in the whole set.
        failures: the asked-for name that could not be computed -> why.
    """

    scores: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, dict[int, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def caption_scores(
    predictions: Mapping[int, str], references: Mapping[int, Sequence[str]], names: Sequence[str]
) -> CaptionScores:
    """Score one caption per image; a scorer that fails is named with its reason and does not take the others with it.

    CIDEr weighs each n-gram by log(images / images whose references have it): on a single image, or where all images share
    their references, it is 0 whatever the caption says.

    Args:
        predictions: image id -> caption; an empty one counts as wrong.
        references: image id -> true captions, the same ids.
        names: of BLEU, METEOR, ROUGE_L, CIDEr.

    Raises:
        UserError: a name is unknown, or an image has no prediction or no reference.
    """
    unknown = [name for name in names if name not in _SCORERS]
    if unknown:
        raise UserError(f"unknown caption metric {unknown[0]!r}; known: {', '.join(_SCORERS)}")
    _check(predictions, references)
    result = CaptionScores()
    try:
        true, told = _tokenize(references, predictions)
    except Exception as error:  # without tokens there is no metric; the captions themselves are still worth keeping
        result.failures.update(dict.fromkeys(names, _reason(error)))
        return result
    for name in names:
        try:
            rows = _SCORERS[name](true, told)
        except Exception as error:  # whatever one scorer stumbles over, the others are still worth having
            result.failures[name] = _reason(error)
            continue
        for metric, (score, values) in rows.items():
            result.scores[metric] = float(score)
            result.per_image[metric] = {image_id: float(value) for image_id, value in zip(true, values, strict=True)}
    return result


def score_names(names: Sequence[str]) -> set[str]:
    """What `caption_scores` calls the values that it gives for the metrics `names`."""
    return {f"BLEU-{n}" for n in range(1, 5) if "BLEU" in names} | {name for name in names if name != "BLEU"}


def _tokenize(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str]) -> tuple[Words, Words]:
    """The words of both, from one start of Java."""
    both = ptb_tokenize({image_id: [predictions[image_id], *captions] for image_id, captions in references.items()})
    return {i: words[1:] for i, words in both.items()}, {i: words[:1] for i, words in both.items()}


def _bleu(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    scores, values = Bleu(4).compute_score(true, told, verbose=0)
    return {f"BLEU-{n}": pair for n, pair in enumerate(zip(scores, values, strict=True), start=1)}


def _meteor(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    return {"METEOR": meteor_scores(true, {image_id: captions[0] for image_id, captions in told.items()})}


def _rouge(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    return {"ROUGE_L": Rouge().compute_score(true, told)}


def _cider(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    return {"CIDEr": Cider().compute_score(true, told)}


_SCORERS: dict[str, Callable[[Words, Words], dict[str, tuple[float, Sequence[float]]]]] = {
    "BLEU": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check(predictions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> None:
    if not references:
        raise UserError("there is no image to score captions of")
    bare = [image_id for image_id, captions in references.items() if not captions]
    if bare:
        raise UserError(f"{len(bare)} of {len(references)} images have no reference caption, e.g. image {bare[0]}")
    missing = [image_id for image_id in references if image_id not in predictions]
    if missing:
        raise UserError(f"{len(missing)} of {len(references)} images were not captioned, e.g. image {missing[0]}")
    unknown = [image_id for image_id in predictions if image_id not in references]
    if unknown:
        raise UserError(f"{len(unknown)} captions are of images without references, e.g. image {unknown[0]}")
