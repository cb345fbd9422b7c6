"""What evaluations have in common: intervals, groups, splits without truth, and files for evaluation servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blip2x.config.run import RunConfig
from blip2x.data.samples import CaptionSample, QuestionSample
from blip2x.engine.run import Run
from blip2x.errors import UserError
from blip2x.metrics.bootstrap import mean_interval
from blip2x.metrics.lemmatise import lemmatise
from blip2x.metrics.vqa import answer_scores
from blip2x.tasks.common.pictures import save_pictures

LEADERBOARD_FILE = "leaderboard.json"
_TYPES: Mapping[str, Callable[[QuestionSample], str]] = {
    "question_type": lambda question: question.question_type,
    "answer_type": lambda question: question.answer_type,
}


def has_truth(samples: Sequence[CaptionSample | QuestionSample]) -> bool:
    """Whether the samples have true captions or answers; a test split, whose owner keeps them, has none at all.

    Raises:
        UserError: some have and some have not, so that a score would be of a part that nobody chose.
    """
    bare = [sample for sample in samples if not _truth(sample)]
    if bare and len(bare) < len(samples):
        what, which = _words(bare[0])
        raise UserError(
            f"{len(bare)} of {len(samples)} samples to evaluate on have no true {what}, e.g. {which}; "
            f"give {what} for all of them, or for none to predict without a score"
        )
    return not bare


def tell_no_score(run: Run, dataset: str, samples: Sequence[CaptionSample | QuestionSample]) -> None:
    """Say why there are predictions and no scores."""
    what, _ = _words(samples[0])
    run.console.print(f"no score exists: {dataset} has no true {what} for eval", markup=False, highlight=False)


def metric_key(name: str, *, scope: str = "", part: str = "") -> str:
    """The key in results.json: ``[scope/]name[/part]``, where the scope is a group of images."""
    return "/".join(piece for piece in (scope, name, part) if piece)


def interval_metrics(
    name: str, values: Sequence[float], images: Sequence[int], *, scope: str = "", part: str = ""
) -> dict[str, float]:
    """The ends of the 95 % interval of the values' mean, under the names that stand beside `name` in results.json."""
    ends = mean_interval(values, images) or ()  # one image has none
    names = (f"ci95_low_{name}", f"ci95_high_{name}")
    return {metric_key(end, scope=scope, part=part): value for end, value in zip(names, ends, strict=False)}


def write_leaderboard(run: Run, cfg: RunConfig, rows: list[dict[str, Any]], *, left_out: int) -> None:
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
    metrics |= {
        "questions": len(questions),
        "images_encoded": images_encoded,
        "questions_per_image_encoded": len(questions) / images_encoded,
    }
    pictures = save_pictures(run, questions)
    run.write_lines(
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
                **row,
                "prediction": found[""][question.question_id],
                **({"written": row["prediction"]} if cfg.task.lemmatise else {}),
                **({"blind": found["blind_"][question.question_id]} if "blind_" in found else {}),
            }
            for question, row in pairs
        ],
        "predictions.jsonl",
    )
    answers = [{"question_id": question_id, "answer": answer} for question_id, answer in found[""].items()]
    write_leaderboard(run, cfg, answers, left_out=left_out)
    return metrics


def _accuracies(prefix: str, scores: Mapping[int, float], questions: Sequence[QuestionSample]) -> dict[str, float]:
    """Of all questions, by type, and by group of images; a single type or group is no part. Baselines have no interval."""
    own = [("", "", list(questions))]
    for name, type_of in _TYPES.items():
        own += [("", f"{name}/{kind}", asked) for kind, asked in split_by(questions, type_of).items()]
    own += [(group, "", asked) for group, asked in split_by(questions, lambda question: question.group).items()]
    results = {}
    for scope, part, asked in own:
        values = [100 * scores[question.question_id] for question in asked]
        results[metric_key(f"{prefix}accuracy", scope=scope, part=part)] = sum(values) / len(values)
        if not prefix:
            images = [question.image_id for question in asked]
            results |= interval_metrics("accuracy", values, images, scope=scope, part=part)
    return results


def split_by(samples: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    """The samples by what `key` gives, in the alphabet's order; nothing unless there are several, samples without any aside."""
    parts: dict[str, list[Any]] = {}
    for sample in samples:
        parts.setdefault(key(sample), []).append(sample)
    parts.pop("", None)
    return dict(sorted(parts.items())) if len(parts) > 1 else {}


def _truth(sample: CaptionSample | QuestionSample) -> tuple[str, ...]:
    return sample.captions if isinstance(sample, CaptionSample) else sample.answers


def _words(sample: CaptionSample | QuestionSample) -> tuple[str, str]:
    """What the truth of such a sample is called, and which one it is."""
    if isinstance(sample, CaptionSample):
        return "captions", f"image {sample.image_id} ({sample.image.name})"
    return "answers", f"question {sample.question_id}"
