"""Caption metrics equal to those of COCO's evaluation: BLEU, METEOR, ROUGE-L, CIDEr (really CIDEr-D) and SPICE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.rouge.rouge import Rouge

from blip2x.errors import UserError
from blip2x.metrics import java, ptb
from blip2x.metrics.cider import cider_scores
from blip2x.metrics.java import meteor_scores
from blip2x.metrics.spice import spice_scores

Words = dict[int, list[str]]  # image id -> tokenized captions


@dataclass(frozen=True)
class CaptionScores:
    """What came out; the papers print 100 times these numbers.

    Attributes:
        scores: metric -> value for the whole set: BLEU-1 to BLEU-4, METEOR, ROUGE_L, SPICE (0 to 1) and CIDEr (0 to 10).
        per_image: metric -> image id -> value. CIDEr's weighs words by how rare they are in the whole set.
        failures: the asked-for name that could not be computed -> why.
        notes: sentences on how the others were computed or what they are worth, where that is not as usual.
    """

    scores: dict[str, float] = field(default_factory=dict)
    per_image: dict[str, dict[int, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def caption_scores(
    predictions: Mapping[int, str], references: Mapping[int, Sequence[str]], names: Sequence[str]
) -> CaptionScores:
    """Score one caption per image; a scorer that fails is named with its reason and does not take the others with it.

    Where Java does not start, Python finds the words, which a note says; METEOR and SPICE cannot do without Java.

    CIDEr weighs each n-gram by log(images / images whose references have it): on a single image, or where all images share
    their references, it is 0 whatever the caption says.

    Args:
        predictions: image id -> caption; an empty one counts as wrong.
        references: image id -> true captions, the same ids.
        names: of BLEU, METEOR, ROUGE_L, CIDEr, SPICE; the last needs files that no package brings, see docs/metrics.md.

    Raises:
        UserError: a name is unknown, or an image has no prediction or no reference.
    """
    unknown = [name for name in names if name not in _SCORERS]
    if unknown:
        raise UserError(f"unknown caption metric {unknown[0]!r}; known: {', '.join(_SCORERS)}")
    _check(predictions, references)
    result = CaptionScores()
    try:
        true, told = _tokenize(references, predictions, result.notes)
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
    if "CIDEr" in result.scores and len(true) == 1:
        result.notes.append(
            "CIDEr of a single image is 0 whatever its caption says; it weighs words by their rarity among images"
        )
    return result


def score_names(names: Sequence[str]) -> set[str]:
    """What `caption_scores` calls the values that it gives for the metrics `names`."""
    return {f"BLEU-{n}" for n in range(1, 5) if "BLEU" in names} | {name for name in names if name != "BLEU"}


def _tokenize(references: Mapping[int, Sequence[str]], predictions: Mapping[int, str], notes: list[str]) -> tuple[Words, Words]:
    """The words of both, from one start of Java."""
    # All references and then all predictions, as in COCO's evaluation, since the tokenizer looks at what begins the next line;
    # the one line in between hides the predictions from the references.
    texts = [caption for captions in references.values() for caption in captions]
    texts += ["x", *(predictions[image_id] for image_id in references)]
    try:
        lines = java.tokenize(texts)
    except java.NoJavaError as error:
        notes.append(f"Python found the words of the captions; those of rare captions may differ from Java's. {error}")
        lines = ptb.tokenize(texts)
    words = iter([ptb.words(line) for line in lines])
    true = {image_id: [next(words) for _ in captions] for image_id, captions in references.items()}
    next(words)
    return true, {image_id: [next(words)] for image_id in references}


def _bleu(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    scores, values = Bleu(4).compute_score(true, told, verbose=0)
    return {f"BLEU-{n}": pair for n, pair in enumerate(zip(scores, values, strict=True), start=1)}


def _meteor(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    return {"METEOR": meteor_scores(true, _only(told))}


def _rouge(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    return {"ROUGE_L": Rouge().compute_score(true, told)}


def _cider(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    values = cider_scores(list(true.values()), list(_only(told).values()))
    return {"CIDEr": (values.mean(), values)}


def _spice(true: Words, told: Words) -> dict[str, tuple[float, Sequence[float]]]:
    return {"SPICE": spice_scores(true, _only(told))}


def _only(told: Words) -> dict[int, str]:
    return {image_id: captions[0] for image_id, captions in told.items()}


_SCORERS: dict[str, Callable[[Words, Words], dict[str, tuple[float, Sequence[float]]]]] = {
    "BLEU": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
    "SPICE": _spice,
}


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (UserError, java.JavaError)) else f"{type(error).__name__}: {error}"


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
