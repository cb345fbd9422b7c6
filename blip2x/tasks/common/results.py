"""From what a model said to results: scores with intervals and baselines, predictions.jsonl, and files for evaluation servers.

A test split whose owner keeps the truth has predictions, but no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip2x.config.run import RunConfig
from blip2x.config.task import AnswerRules
from blip2x.data.samples import CaptionSample, QuestionSample, has_truth
from blip2x.engine.report import EXTREMES, QUESTION_EXTREMES
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.metrics.bootstrap import mean_intervals
from blip2x.metrics.caption import CaptionScores
from blip2x.metrics.lemmatise import lemmatise
from blip2x.metrics.vqa import answer_scores
from blip2x.tasks.common.attention import looks_file, write_looks
from blip2x.tasks.common.captioning import score_captions
from blip2x.tasks.common.pictures import save_pictures

LEADERBOARD_FILE = "leaderboard.json"
_MEANS = ("ROUGE_L", "CIDEr", "SPICE")  # whose value of a set of images is the mean over them; BLEU's and METEOR's are not
_TYPES: Mapping[str, Callable[[QuestionSample], str]] = {
    "question_type": lambda question: question.question_type,
    "answer_type": lambda question: question.answer_type,
}


def check_questions(cfg: RunConfig, questions: Sequence[QuestionSample]) -> None:
    """Raise `UserError` where the rules to score by know one answer and there are several."""
    rules = cfg.task.answer_rules
    if rules not in (AnswerRules.gqa, AnswerRules.gqa_lavis):
        return
    several = [question for question in questions if len(question.answers) > 1]
    if several:
        raise UserError(
            f"task.answer_rules={rules.value} compares with one answer per question, but {len(several)} of {len(questions)} "
            f"questions have several, e.g. question {several[0].question_id}; choose vqa or aokvqa"
        )


def metric_key(name: str, *, scope: str = "", part: str = "") -> str:
    """The key in results.json: ``[scope/]name[/part]``, where the scope is a group of images."""
    return "/".join(piece for piece in (scope, name, part) if piece)


def interval_metrics(name: str, ends: tuple[float, float] | None, *, scope: str = "", part: str = "") -> dict[str, float]:
    """The ends of a 95 % interval under the names that stand beside `name` in results.json; nothing for None."""
    if ends is None:
        return {}
    names = (f"ci95_low_{name}", f"ci95_high_{name}")
    return {metric_key(end, scope=scope, part=part): value for end, value in zip(names, ends, strict=True)}


def answer_results(
    run: Run,
    cfg: RunConfig,
    pairs: Sequence[tuple[QuestionSample, dict[str, Any]]],
    *,
    baselines: Mapping[str, Mapping[int, str]],
    images_encoded: int,
    left_out: int,
) -> dict[str, float]:
    """Score answers and write predictions.jsonl and leaderboard.json. On the main rank alone.

    Args:
        run: the task's run.
        cfg: the whole config; its task is one that answers.
        pairs: what `Answering.answer` gave.
        baselines: "blind", "majority" -> question id -> the answer of a model that lacks something.
        images_encoded: as `Answering` counted them.
        left_out: questions that were not asked since their image is missing or cannot be read.

    Returns:
        accuracy in per cent: of all, by type of question and of answer, and by group of images, where there are several; their
        intervals and baselines; the counts.
    """
    questions = [question for question, _ in pairs]
    found = {"": {row["question_id"]: row["prediction"] for _, row in pairs}}
    for name, answers in baselines.items():
        found[f"{name}_"] = {question.question_id: answers[question.question_id] for question in questions}
    if cfg.task.lemmatise:  # what the language model wrote; the commonest answers are people's
        for prefix in found.keys() & {"", "blind_"}:
            found[prefix] = dict(zip(found[prefix], lemmatise(list(found[prefix].values())), strict=True))
    run.console.print(
        f"{len(questions)} questions, {images_encoded} images encoded: {len(questions) / images_encoded:.2f} questions per "
        "image encoded",
        markup=False,
        highlight=False,
    )
    metrics: dict[str, float] = {}
    scores: dict[int, float] = {}
    if has_truth(questions):
        truth = {question.question_id: question.answers for question in questions}
        for prefix, predictions in found.items():
            own = answer_scores(predictions, truth, cfg.task.answer_rules.value)
            metrics |= _accuracies(prefix, own, questions)
            scores = scores or own
    else:
        _tell_no_score(run, cfg, "answers")
    metrics |= {
        "questions": len(questions),
        "images_encoded": images_encoded,
        "questions_per_image_encoded": len(questions) / images_encoded,
    }
    of_image: dict[int, list[float]] = {}
    for question in questions if scores else []:
        of_image.setdefault(question.image_id, []).append(scores[question.question_id])
    means = {image_id: sum(values) / len(values) for image_id, values in of_image.items()}
    looks = {question.image_id: row["shares"] for question, row in pairs if "shares" in row}
    pictures = _save_pictures(run, questions, means, QUESTION_EXTREMES, looks)
    attention = _write_looks(run, pictures, looks)
    run.write_predictions(
        [
            {
                "stage": run.stage,
                "image_id": question.image_id,
                "group": question.group,
                "image": pictures.get(question.image_id),
                "name": question.image.name,
                "question": question.question,
                "question_type": question.question_type,
                "answer_type": question.answer_type,
                "answers": list(question.answers),
                "correct": scores.get(question.question_id),
                **_told(row, attention.get(question.image_id)),
                "prediction": found[""][question.question_id],
                **({"written": row["prediction"]} if cfg.task.lemmatise else {}),
                **({"blind": found["blind_"][question.question_id]} if "blind_" in found else {}),
            }
            for question, row in pairs
        ]
    )
    answers = [{"question_id": question_id, "answer": answer} for question_id, answer in found[""].items()]
    _write_leaderboard(run, cfg, answers, left_out=left_out)
    return metrics


def caption_results(
    run: Run,
    cfg: RunConfig,
    pairs: Sequence[tuple[CaptionSample, dict[str, Any]]],
    *,
    blind: str | None,
    left_out: int,
) -> dict[str, float]:
    """Score captions and write predictions.jsonl and leaderboard.json. On the main rank alone.

    Args:
        run: the task's run.
        cfg: the whole config, of the task caption.
        pairs: samples, each with its row of `HeldOutCaptions`.
        blind: the caption of the model that sees no image, to be scored for comparison; None: there is none.
        left_out: images that were not captioned since they are missing or cannot be read.

    Returns:
        The scores of `task.metrics` of all images and, where there are several groups, of each group as a set of its own;
        their intervals and baselines; the count of images.
    """
    samples, scores = [sample for sample, _ in pairs], CaptionScores()
    captions = {sample.image_id: row["caption"] for sample, row in pairs}
    metrics: dict[str, float] = {}
    if has_truth(samples):
        scores, metrics = _caption_scores(run, samples, captions, blind, cfg.task.metrics)
        names = [name for name in cfg.task.metrics if name not in scores.failures]  # told once is enough
        # NoCaps' domains are evaluated so, each from its own images: a phrase's weight in CIDEr is its rarity among them
        for group, places in _places_by([sample.group for sample in samples]).items():
            own = [samples[place] for place in places]
            metrics |= _caption_scores(run, own, captions, blind, names, scope=group)[1]
    else:
        _tell_no_score(run, cfg, "captions")
    metrics["images"] = len(pairs)
    ranking = scores.per_image.get(min(scores.per_image, key=lambda name: (name != "CIDEr", name), default=""), {})
    looks = {sample.image_id: row["shares"] for sample, row in pairs if "shares" in row}
    pictures = _save_pictures(run, samples, ranking, EXTREMES, looks)
    attention = _write_looks(run, pictures, looks)
    run.write_predictions(
        [
            {
                "stage": run.stage,
                "group": sample.group,
                "image": pictures.get(sample.image_id),
                "name": sample.image.name,
                **_told(row, attention.get(sample.image_id)),
                "references": list(sample.captions),
                "blind": blind,
                "scores": {name: values[sample.image_id] for name, values in scores.per_image.items()},
            }
            for sample, row in pairs
        ]
    )
    said = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    _write_leaderboard(run, cfg, said, left_out=left_out)
    return metrics


def _caption_scores(
    run: Run,
    samples: Sequence[CaptionSample],
    captions: Mapping[int, str],
    blind: str | None,
    names: Sequence[str],
    scope: str = "",
) -> tuple[CaptionScores, dict[str, float]]:
    """Scores of these images' captions, and the same as metrics with intervals and with the blind caption's beside."""
    references = {sample.image_id: sample.captions for sample in samples}
    scores = score_captions(run, {image_id: captions[image_id] for image_id in references}, references, names)
    metrics = {metric_key(name, scope=scope): value for name, value in scores.scores.items()}
    for name in [name for name in _MEANS if name in scores.per_image]:
        values = scores.per_image[name]
        (ends,) = mean_intervals(list(values.values()), list(values), [range(len(values))])
        metrics |= interval_metrics(name, ends, scope=scope)
    if blind is not None:
        without = score_captions(run, dict.fromkeys(references, blind), references, names)
        metrics |= {metric_key(f"blind_{name}", scope=scope): value for name, value in without.scores.items()}
    return scores, metrics


def _accuracies(prefix: str, scores: Mapping[int, float], questions: Sequence[QuestionSample]) -> dict[str, float]:
    """Of all questions, by type, and by group of images; a single type or group is no part. Baselines have no interval."""
    parts = [("", "", list(range(len(questions))))]  # scope, part, places among the questions
    for name, type_of in _TYPES.items():
        parts += [("", f"{name}/{kind}", places) for kind, places in _places_by([type_of(q) for q in questions]).items()]
    parts += [(group, "", places) for group, places in _places_by([question.group for question in questions]).items()]
    values = [100 * scores[question.question_id] for question in questions]
    images = [question.image_id for question in questions]
    ends = mean_intervals(values, images, [] if prefix else [places for *_, places in parts])
    results = {}
    for index, (scope, part, places) in enumerate(parts):
        key = metric_key(f"{prefix}accuracy", scope=scope, part=part)
        results[key] = sum(values[place] for place in places) / len(places)
        if not prefix:
            results |= interval_metrics("accuracy", ends[index], scope=scope, part=part)
    return results


def _places_by(kinds: Sequence[str]) -> dict[str, list[int]]:
    """Where each kind stands, in the alphabet's order; nothing unless there are several, places with "" aside."""
    found: dict[str, list[int]] = {}
    for place, kind in enumerate(kinds):
        found.setdefault(kind, []).append(place)
    found.pop("", None)
    return dict(sorted(found.items())) if len(found) > 1 else {}


def _save_pictures(
    run: Run,
    samples: Sequence[CaptionSample | QuestionSample],
    scores: Mapping[int, float],
    extremes: int,
    looks: Iterable[int],
) -> dict[int, str]:
    """Keep copies for the report: of images that score best and worst, of those of `looks`, and of as many others as fit."""
    ranked = [sorted(scores, key=scores.__getitem__, reverse=best)[:extremes] for best in (True, False)]
    return save_pictures(run, samples, [*(image_id for ends in ranked for image_id in ends), *looks])


def _write_looks(run: Run, pictures: Mapping[int, str], looks: Mapping[int, np.ndarray]) -> dict[int, str]:
    """Of the images that a copy was kept of, where the queries looked: image id -> path below the run's folder."""
    files = {
        image_id: looks_file(run.path(pictures[image_id]).read_bytes(), share_QP)
        for image_id, share_QP in looks.items()
        if image_id in pictures
    }
    return {image_id: write_looks(run, image_id, content) for image_id, content in files.items() if content}


def _told(row: Mapping[str, Any], attention: str | None) -> dict[str, Any]:
    """A row as predictions.jsonl has it: in the place of the shares the path of their picture."""
    told = {name: value for name, value in row.items() if name != "shares"}
    return told | {"attention": attention} if attention and "shares" in row else told


def _write_leaderboard(run: Run, cfg: RunConfig, rows: list[dict[str, Any]], *, left_out: int) -> None:
    """Write the file that evaluation servers take, whole, and only if nothing of the split is missing; else say why not.

    Args:
        run: the task's run.
        cfg: the whole config.
        rows: {"question_id", "answer"} (VQAv2) or {"image_id", "caption"} (COCO, NoCaps) per question or image.
        left_out: how many of the split are not in `rows` since their image is missing or cannot be read.
    """
    if cfg.dataset.eval_limit is None and not left_out:
        run.write_json(rows, LEADERBOARD_FILE)
        return
    limit = f"dataset.eval_limit={cfg.dataset.eval_limit} leaves images out"
    reason = limit if cfg.dataset.eval_limit is not None else f"{left_out} left out with images that cannot be read"
    run.console.print(f"no {LEADERBOARD_FILE} was written: {reason}", markup=False, highlight=False)


def _tell_no_score(run: Run, cfg: RunConfig, what: str) -> None:
    run.console.print(f"no score exists: {cfg.dataset.name} has no true {what} for eval", markup=False, highlight=False)
