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

from blip2x.engine.comparisons import BASELINES, HEADLINES, PARTS, Measure, metric_title, read_measures, stage_title
from blip2x.engine.report_sections.confusion import confusion
from blip2x.engine.report_sections.costs import stage_costs, whole_cost
from blip2x.engine.report_sections.curves import stage_curves
from blip2x.engine.report_sections.rows import Row, by, group, is_number, look_up
from blip2x.engine.report_sections.settings import changed_settings
from blip2x.engine.report_sections.state import machine, unfinished
from blip2x.engine.run_files import Picture, RunFiles, read_run
from blip2x.pages import render_page

RANDOM, EXTREMES = 8, 4  # captioned pictures shown: drawn at random; best and worst
QUESTION_PICTURES, QUESTION_EXTREMES = 6, 3
SEARCH_RANDOM, SEARCH_EXTREMES = 6, 3  # of searches by pictures, and of as many by texts
FOUND = 5  # candidates shown of each search
PREDICTIONS = 60
ATTENTION_BYTES = 1_000_000  # of all pictures of attention on a page, as they are embedded
DIFF_LINES = 400

_SEARCHES = {  # key of what was found -> title, what is counted, what is found
    "retrieved_texts": ("Texts found for a picture", "searches by a picture", "text"),
    "retrieved_images": ("Pictures found for a text", "searches by a text", "picture"),
}


@dataclass(frozen=True)
class Shown:
    """A few of many, and the sentence that says how they were chosen."""

    title: str
    note: str
    items: list[Any]


class _Attention:
    """Pictures of where the queries look, until the page has `ATTENTION_BYTES` of them."""

    def __init__(self, run: RunFiles):
        self._run = run
        self._bytes = 0
        self.left_out = 0

    def picture(self, row: Row) -> Picture | None:
        """None where the row has none, or the page enough."""
        found = self._run.picture(row, "attention")
        if found is None:
            return None
        if self._bytes + len(found.uri) > ATTENTION_BYTES:
            self.left_out += 1
            return None
        self._bytes += len(found.uri)
        return found


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the run `folder` and return its path; of a run that failed, with what there is.

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
        return -float(row["rank"]) if is_number(row.get("rank")) else math.nan

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
    # of each picture there is a line per prompt
    predicted = list(group([row for row in run.predictions if "texts" in row], lambda row: str(row.get("source"))).values())
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
        measures=group([measure for measure in measures if not measure.part], lambda measure: measure.stage),
        unfinished=unfinished(run),
        attention=_Attention(run),
        curves=stage_curves(run.metrics, run.schedules, run.results),
        # the last stage first: it speaks for the run
        captions={stage: _caption_groups(rows) for stage, rows in reversed(by(captions, "stage").items())},
        questions={stage: _question_groups(rows) for stage, rows in by(questions, "stage").items()},
        searches={stage: _searches(rows) for stage, rows in by(searches, "stage").items()},
        predicted=predicted[:PREDICTIONS],
        predicted_total=len(predicted),
        parts=_parts(measures),
        part_counts=Counter((row.get("stage"), f"{kind}/{row.get(kind)}") for row in questions for kind in PARTS),
        scopes=_scopes(measures),
        confusions={stage: confusion(rows) for stage, rows in by(questions, "stage").items()},
        cost=whole_cost(run),
        stage_costs=stage_costs(run),
        machine=machine(run.hardware),
        settings=changed_settings(run) if run.config else None,
        diff=_first_lines(run.diff, DIFF_LINES),
    )


def _facts(run: RunFiles) -> dict[str, str]:
    """What was run, from the config."""
    planned = look_up(run.config, "task", "stages") or []
    stages = [stage.get("name") or stage.get("task") for stage in planned if isinstance(stage, dict)]
    done = [stage for stage in stages if stage in run.results] or stages
    facts = {
        "Task": look_up(run.config, "task", "kind"),
        "Model": look_up(run.config, "model", "name"),
        "Data set": look_up(run.config, "dataset", "name"),
        "Seed": look_up(run.config, "seed"),
        "Finished": run.finished,
        "Ended": "" if run.finished else run.ended,
        "Stages": " \u2192 ".join(str(stage) for stage in done),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _tiles(measures: list[Measure]) -> list[Measure]:
    """The figures that sum a run up: each stage's headline metrics, those with a baseline to stand beside first."""
    whole = [measure for measure in measures if not measure.scope and not measure.part]
    chosen = []
    for rows in group(whole, lambda measure: measure.stage).values():
        chosen += [measure for measure in rows if measure.name in HEADLINES] or rows[:1]
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


def _caption_groups(rows: list[Row]) -> list[Shown]:
    def scores(row: Row) -> dict[str, Any]:
        found = row.get("scores")
        return found if isinstance(found, dict) else {}

    scored = [name for row in rows for name in scores(row)]
    name = "CIDEr" if "CIDEr" in scored else min(scored, default="")

    def score(row: Row) -> float:
        value = scores(row).get(name)
        return float(value) if is_number(value) else math.nan

    kept = _best_kept(rows, lambda row, key: row.get(key), RANDOM)
    return _choose(rows, kept, score, f"captions by {name}", "captioned pictures", RANDOM, EXTREMES)


def _best_kept(items: list[Any], has: Callable[[Any, str], Any], count: int) -> list[Any]:
    """Those of which the run keeps where the queries look, drawn by lot, too; of too few, those with a picture."""
    looked_at = [item for item in items if has(item, "attention")]
    return looked_at if len(looked_at) >= count else [item for item in items if has(item, "image")]


def _question_groups(rows: list[Row]) -> list[Shown]:
    pictures = list(group(rows, lambda row: (str(row.get("_folder")), str(row.get("image_id", row.get("image"))))).values())

    def score(picture: list[Row]) -> float:
        values = [row["correct"] for row in picture if is_number(row.get("correct"))]
        return statistics.fmean(values) if values else math.nan

    criterion = "pictures by mean score of their answers"
    kept = _best_kept(pictures, lambda picture, key: any(row.get(key) for row in picture), QUESTION_PICTURES)
    return _choose(pictures, kept, score, criterion, "pictures with questions", QUESTION_PICTURES, QUESTION_EXTREMES)


def _searches(rows: list[Row]) -> dict[str, list[Shown]]:
    """Searches to show by the title of their kind, each as {"row", "found", "own"}.

    "found" are the first candidates; "own" is, where none of these is right, what would have been, as far as the run tells.
    """
    texts = group([row for row in rows if "text" in row], lambda row: row.get("image_id"))
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
    """By what a metric was split by, each type with its measure; with the stage before it where several have any."""
    found: dict[str, list[tuple[str, Measure]]] = {}
    several = len({measure.stage for measure in measures if measure.part and not measure.scope}) > 1
    for measure in measures:
        if measure.part and not measure.scope:
            kind, _, label = measure.part.partition("/")
            title, label = (PARTS[kind], label) if kind in PARTS else ("type", measure.part)
            label = f"{stage_title(measure.stage)}: {label}" if several else label
            found.setdefault(title, []).append((label, measure))
    return found


def _scopes(measures: list[Measure]) -> tuple[list[str], list[dict[str, Measure]]]:
    """The scopes that occur, and per metric its measure in each; empty where nothing was reported apart."""
    rows = group([m for m in measures if not m.part], lambda measure: (measure.stage, measure.name)).values()
    apart = [{measure.scope: measure for measure in row} for row in rows if any(measure.scope for measure in row)]
    return sorted(dict.fromkeys(scope for row in apart for scope in row), key=bool), apart  # "", all, comes first


def _first_lines(text: str, most: int) -> str:
    lines = text.splitlines()
    return text if len(lines) <= most else "\n".join([*lines[:most], f"[{len(lines) - most:,} more lines in diff.patch]"])
