"""A run folder -> one page, report.html, that needs nothing but itself."""

from __future__ import annotations

import math
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2x.engine.charts import MAX_POINTS, line_chart
from blip2x.engine.comparisons import BASELINES, PARTS, Measure, metric_title, read_measures, stage_title
from blip2x.engine.run_files import TIMES, RunFiles, read_run
from blip2x.optim.schedule import planned_rates
from blip2x.pages import render_page

RANDOM, EXTREMES = 8, 4  # captioned pictures shown: drawn at random; best and worst
QUESTION_PICTURES, QUESTION_EXTREMES = 6, 3
SEARCH_RANDOM, SEARCH_EXTREMES = 6, 3  # of searches by pictures, and of as many by texts
FOUND = 5  # candidates shown of each search
PREDICTIONS = 60

_HEADLINES = ("i2t_recall@1", "t2i_recall@1", "CIDEr", "accuracy")  # a stage without any shows its first metric
_SEARCHES = {  # key of what was found -> title, what is counted, what is found
    "retrieved_texts": ("Texts found for a picture", "searches by a picture", "text"),
    "retrieved_images": ("Pictures found for a text", "searches by a text", "picture"),
}
_LOSS_PARTS = ("loss", "itc", "itm", "lm")
_NOT_CURVES = ("stage", "step", *TIMES)
_CURVE_TITLES = {"lr": "learning rate", "grad_norm": "gradient norm"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """A few of many, and the sentence that says how they were chosen."""

    title: str
    note: str
    items: list[Any]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the finished run `folder` and return its path.

    The same files give the same page. Whoever reads it meanwhile sees the old page or the new, never half of one.

    Raises:
        UserError: `folder` is no run folder.
    """
    folder = Path(folder)
    page = _render(read_run(folder))
    target = folder / "report.html"
    partial = folder / ".report.html.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    return target


def shown_searches(rows: list[Row]) -> dict[str, list[Shown]]:
    """Which lines of a retrieval's predictions.jsonl the report shows, by pictures ("retrieved_texts") and by texts.

    They do not depend on the pictures that were kept, so that a run can keep theirs.
    """

    def score(row: Row) -> float:
        return -float(row["rank"]) if _is_number(row.get("rank")) else math.nan

    found = {}
    for way, (_, queries, right) in _SEARCHES.items():
        own = [row for row in rows if row.get(way)]
        own = random.Random(0).sample(own, len(own))  # as they come, the best texts would be those of a single picture
        criterion = f"{queries}, ranked by the place of the first right {right}"
        ties = "ties drawn at random"
        found[way] = _choose(own, own, score, criterion, queries, SEARCH_RANDOM, SEARCH_EXTREMES, ties)
    return {way: groups for way, groups in found.items() if any(group.items for group in groups)}


def _render(run: RunFiles) -> str:
    measures = read_measures(run.results)
    captions = [row for row in run.predictions if "caption" in row]
    questions = [row for row in run.predictions if "question" in row]
    predicted = [row for row in run.predictions if "texts" in row]
    searches = [row for row in run.predictions if any(row.get(way) for way in _SEARCHES)]
    functions = {
        "stage_title": stage_title,
        "metric_title": metric_title,
        "baseline_titles": BASELINES,
        "bar": _bar,
        "mark": _mark,
    }
    return render_page(
        Path(__file__).with_name("report.html.jinja"),
        functions,
        run=run,
        name=run.config.get("run_name") or run.folder.resolve().name,
        facts=_facts(run),
        tiles=_tiles(measures),
        measures=_group([measure for measure in measures if not measure.part], lambda measure: measure.stage),
        curves=_curves(run.metrics, run.schedules),
        # the last stage first: it speaks for the run
        captions={stage: _caption_groups(rows) for stage, rows in reversed(_by(captions, "stage").items())},
        questions={stage: _question_groups(rows) for stage, rows in _by(questions, "stage").items()},
        searches={stage: _searches(rows) for stage, rows in _by(searches, "stage").items()},
        predicted=predicted[:PREDICTIONS],
        predicted_total=len(predicted),
        parts=_parts(measures),
        part_counts=Counter((row.get("stage"), f"{kind}/{row.get(kind)}") for row in questions for kind in PARTS),
        scopes=_scopes(measures),
        cost=_cost(run),
        stage_costs=_stage_costs(run.metrics),
    )


def _facts(run: RunFiles) -> dict[str, str]:
    """What was run, from the config."""

    def at(*keys: str) -> Any:
        value: Any = run.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    stages = [stage.get("name") or stage.get("task") for stage in at("task", "stages") or [] if isinstance(stage, dict)]
    done = [stage for stage in stages if stage in run.results] or stages
    facts = {
        "Task": at("task", "kind"),
        "Model": at("model", "name"),
        "Data set": at("dataset", "name"),
        "Seed": at("seed"),
        "Finished": run.finished,
        "Stages": " \u2192 ".join(str(stage) for stage in done),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _tiles(measures: list[Measure]) -> list[Measure]:
    """The figures that sum a run up: each stage's headline metrics, those with a baseline to stand beside first."""
    whole = [measure for measure in measures if not measure.scope and not measure.part]
    chosen = []
    for rows in _group(whole, lambda measure: measure.stage).values():
        chosen += [measure for measure in rows if measure.name in _HEADLINES] or rows[:1]
    return sorted(chosen, key=lambda measure: not measure.baselines)


def _bar(measure: Measure, value: float) -> float:
    """Length of `value`'s bar in per cent; bars of one measure share a scale, which for shares is the whole."""
    values = [measure.value, *(baseline.value for baseline in measure.baselines)]
    full = 100 / measure.percent(1) if measure.is_share else max((v for v in values if math.isfinite(v)), default=0.0)
    return round(min(max(100 * value / full, 0), 100), 2) if math.isfinite(value) and full > 0 else 0.0


def _mark(correct: Any) -> tuple[str, str, str]:
    """(class, sign, word) of an answer's score."""
    if not isinstance(correct, (int, float)) or math.isnan(correct):
        return "unscored", "?", "not scored"
    if correct >= 1:
        return "right", "\u2713", "right"
    return ("wrong", "\u2717", "wrong") if correct <= 0 else ("partly", "\u25d0", f"partly right, {correct:.2f}")


def _curves(metrics: list[Row], schedules: dict[str, Row]) -> dict[str, list[tuple[str, Any, int]]]:
    """Each stage's panels (title, chart, count of values that are no number): loss parts together, all else one by one.

    The learning rate is drawn as it was planned, with dots for what was logged.
    """
    stages = {}
    for stage, rows in _by(metrics, "stage").items():
        series: dict[str, dict[float, float]] = {}
        for row in rows:
            for name, value in row.items():
                if name not in _NOT_CURVES and isinstance(row.get("step"), int) and (value is None or _is_number(value)):
                    # a repeated step is a resumed run's: the later line holds
                    series.setdefault(name, {})[row["step"]] = math.nan if value is None else float(value)
        parts = [name for name in _LOSS_PARTS if name in series]
        groups = [("loss" if len(parts) < 2 else "loss and its parts", parts)] if parts else []
        groups += [(_CURVE_TITLES.get(name, metric_title(name)), [name]) for name in sorted(series) if name not in parts]
        panels = []
        for title, names in groups:
            lines = {name: sorted(series[name].items()) for name in names}
            gaps = sum(not math.isfinite(value) for points in lines.values() for _, value in points)
            planned = _planned(schedules.get(stage)) if names == ["lr"] else []
            if planned:
                lines = {"plan": planned, "logged": lines["lr"]}
            panels.append((title, line_chart(f"{stage_title(stage)}: {title}", lines, dots=["logged"]), gaps))
        stages[stage] = panels
    return {stage: panels for stage, panels in stages.items() if panels}


def _planned(shape: Row | None) -> list[tuple[int, float]]:
    try:
        return planned_rates(MAX_POINTS - 1, **shape) if shape else []
    except (TypeError, KeyError, ValueError, ZeroDivisionError):  # not what a training writes: the logged rates remain
        return []


def _caption_groups(rows: list[Row]) -> list[Shown]:
    scored = [name for row in rows for name in row.get("scores") or {}]
    name = "CIDEr" if "CIDEr" in scored else min(scored, default="")

    def score(row: Row) -> float:
        value = (row.get("scores") or {}).get(name)
        return float(value) if _is_number(value) else math.nan

    kept = [row for row in rows if row.get("image")]
    return _choose(rows, kept, score, f"captions by {name}", "captioned pictures", RANDOM, EXTREMES)


def _question_groups(rows: list[Row]) -> list[Shown]:
    pictures = list(_group(rows, lambda row: (str(row.get("_folder")), str(row.get("image_id", row.get("image"))))).values())

    def score(picture: list[Row]) -> float:
        values = [row["correct"] for row in picture if _is_number(row.get("correct"))]
        return statistics.fmean(values) if values else math.nan

    criterion = "pictures by mean score of their answers"
    kept = [picture for picture in pictures if picture[0].get("image")]
    return _choose(pictures, kept, score, criterion, "pictures with questions", QUESTION_PICTURES, QUESTION_EXTREMES)


def _searches(rows: list[Row]) -> dict[str, list[Shown]]:
    """Searches to show by the title of their kind, each as {"row", "found", "own"}.

    "found" are the first candidates; "own" is, where none of these is right, what would have been, as far as the run tells.
    """
    texts = _group([row for row in rows if "text" in row], lambda row: row.get("image_id"))
    images = {row.get("image_id"): row for row in rows if "retrieved_texts" in row}

    def card(row: Row, way: str) -> Row:
        found = [{**entry, "_folder": row["_folder"]} for entry in row[way][:FOUND]]
        if any(entry.get("right") for entry in found):
            return {"row": row, "found": found, "own": []}
        image_id = row.get("image_id")
        own = texts.get(image_id, []) if way == "retrieved_texts" else [images[image_id]] if image_id in images else []
        return {"row": row, "found": found, "own": own}

    return {
        _SEARCHES[way][0]: [Shown(group.title, group.note, [card(row, way) for row in group.items]) for group in groups]
        for way, groups in shown_searches(rows).items()
    }


def _choose(
    items: list[Any],
    kept: list[Any],
    score: Callable[[Any], float],
    criterion: str,
    what: str,
    at_random: int,
    extremes: int,
    ties: str = "ties as they come in the file",
) -> list[Shown]:
    """Random ones first, of those whose picture was `kept`, for they tell what to expect; then the best and the worst."""
    scored = sorted((item for item in items if math.isfinite(score(item))), key=score, reverse=True)
    if len(items) <= at_random + 2 * extremes:
        rest = [item for item in items if not math.isfinite(score(item))]
        order = ", best first" if scored else ""
        return [Shown("All", f"All {len(items)} {what}{order}.", scored + rest)]
    pool = kept if len(kept) >= at_random else items
    drawn = random.Random(0).sample(pool, at_random)
    source = f" from the {len(pool)} that copies were kept of" if len(pool) < len(items) else ""
    note = f"{at_random} of {len(items)} {what}, drawn at random{source} whatever their score."
    groups = [Shown("Random", note, drawn)]
    if scored:
        best, worst = scored[:extremes], sorted(scored, key=score)[:extremes]
        groups.append(Shown("Best", f"The {len(best)} best of {len(scored)} {criterion}; {ties}.", best))
        groups.append(Shown("Worst", f"The {len(worst)} worst of {len(scored)} {criterion}; {ties}.", worst))
    return groups


def _parts(measures: list[Measure]) -> dict[str, list[tuple[str, Measure]]]:
    """By what an accuracy was split by, each type with its measure."""
    found: dict[str, list[tuple[str, Measure]]] = {}
    for measure in measures:
        if measure.part and not measure.scope:
            kind, _, label = measure.part.partition("/")
            title, label = (PARTS[kind], label) if kind in PARTS else ("type", measure.part)
            found.setdefault(title, []).append((label, measure))
    return found


def _scopes(measures: list[Measure]) -> tuple[list[str], list[dict[str, Measure]]]:
    """The scopes that occur, and per metric its measure in each; empty where nothing was reported apart."""
    rows = _group([m for m in measures if not m.part], lambda measure: (measure.stage, measure.name)).values()
    apart = [{measure.scope: measure for measure in row} for row in rows if any(measure.scope for measure in row)]
    return sorted(dict.fromkeys(scope for row in apart for scope in row), key=bool), apart  # "", all, comes first


def _cost(run: RunFiles) -> dict[str, str]:
    seconds, memory = run.results.get("seconds"), run.results.get("peak_memory_gb")
    cost = {}
    if _is_number(seconds) and math.isfinite(seconds):
        cost["Time"] = _duration(seconds)
    if _is_number(memory) and math.isfinite(memory):
        cost["Peak memory"] = f"{memory:.2f} GB"
    return cost


def _stage_costs(metrics: list[Row]) -> list[tuple[str, str, str, str]]:
    """(stage, optimizer steps, time of training, median samples per second) of each stage that trained."""
    costs = []
    for stage, rows in _by(metrics, "stage").items():

        def column(key: str, rows: list[Row] = rows) -> list[float]:
            return [row[key] for row in rows if _is_number(row.get(key)) and math.isfinite(row[key])]

        steps, seconds, rates = column("step"), column("seconds"), column("samples_per_second")
        if steps and (seconds or rates):
            rate = f"{statistics.median(rates):,.0f}" if rates else ""
            costs.append((stage, f"{max(steps):,.0f}", _duration(max(seconds)) if seconds else "", rate))
    return costs


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _by(rows: list[Row], key: str) -> dict[str, list[Row]]:
    return _group(rows, lambda row: str(row.get(key, "run")))


def _group(rows: list[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Rows by key, both in order of appearance."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
