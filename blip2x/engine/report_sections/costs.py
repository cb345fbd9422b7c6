"""What a run cost: time, memory, pictures and waiting, of the whole and of each stage."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from dataclasses import dataclass

from blip2x.engine.report_sections.rows import Row, by, is_number, numbers
from blip2x.engine.run_files import RunFiles


@dataclass(frozen=True)
class StageCost:
    """A stage's row; texts, "" for what is not known."""

    stage: str
    steps: str = ""
    seconds: str = ""  # of training
    samples: str = ""  # that training has seen
    rate: str = ""  # samples per second, median
    tokens: str = ""  # per second, median
    wait: str = ""  # share of time waiting for data
    memory: str = ""  # most
    evaluated: str = ""  # pictures with predictions


def whole_cost(run: RunFiles) -> dict[str, str]:
    """Time, peak memory, and how many pictures the stages saw."""
    cost = {}
    seconds, memory, starts = (run.results.get(key) for key in ("seconds", "peak_memory_gb", "starts"))
    if is_number(seconds) and math.isfinite(seconds):
        cost["Time"] = duration(seconds) + (f" (the last of {starts} starts)" if is_number(starts) and starts > 1 else "")
    if is_number(memory) and math.isfinite(memory):
        cost["Peak memory"] = f"{memory:.2f} GB"
    samples = sum(_samples(rows) for rows in by(run.metrics, "stage").values())
    if samples:
        cost["Samples trained on"] = f"{samples:,}"
    images = sum(_images(rows) for rows in by(run.predictions, "stage").values())
    if images:
        cost["Pictures evaluated"] = f"{images:,}"
    return cost


def stage_costs(run: RunFiles) -> list[StageCost]:
    """Of each stage that trained or left predictions, in the order in which they ran."""
    trained, evaluated = by(run.metrics, "stage"), by(run.predictions, "stage")
    costs = []
    for stage in dict.fromkeys([*trained, *evaluated]):
        rows, images = trained.get(stage, []), _images(evaluated.get(stage, []))
        seconds, rates = numbers(rows, "seconds"), numbers(rows, "samples_per_second")
        if not (seconds or rates or images):
            continue
        steps, samples = numbers(rows, "step"), _samples(rows)
        tokens, memory = numbers(rows, "tokens_per_second"), numbers(rows, "memory_gb")
        wait = _wait(rows)
        costs.append(
            StageCost(
                stage,
                f"{max(steps):,.0f}" if steps and (seconds or rates) else "",
                duration(max(seconds)) if seconds else "",
                f"{samples:,}" if samples else "",
                f"{statistics.median(rates):,.0f}" if rates else "",
                f"{statistics.median(tokens):,.0f}" if tokens else "",
                "" if wait is None else f"{100 * wait:.1f} %",
                f"{max(memory):.2f} GB" if memory else "",
                f"{images:,}" if images else "",
            )
        )
    return costs


def duration(seconds: float) -> str:
    """A time as one says it: 4.2 s, 4 min 40 s, 3 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _spans(rows: list[Row]) -> list[tuple[Row, int, float]]:
    """(line, steps since the line before, seconds since then) of a training's lines."""
    lines = [row for row in rows if numbers([row], "seconds") and numbers([row], "step")]
    lines = list({row["step"]: row for row in lines}.values())  # of a step that was taken twice, the later
    before: list[Row] = [{"step": 0, "seconds": 0.0}, *lines]
    spans = [(b, b["step"] - a["step"], b["seconds"] - a["seconds"]) for a, b in itertools.pairwise(before)]
    return [span for span in spans if span[1] > 0 and span[2] > 0]


def _samples(rows: list[Row]) -> int:
    """All steps times the samples of a step, a whole number, which is the median of what lines say by their rate and time.

    Lines behind a validation or of a step that was taken twice say too much, as their time has more in it than their rate; the
    others count, where there are any.
    """
    steps = [row for row in rows if numbers([row], "step")]
    validated = {row["step"] for row in steps if not numbers([row], "seconds")}
    twice = {step for step, times in Counter(row["step"] for row in steps if numbers([row], "seconds")).items() if times > 1}
    spans = _spans(rows)
    spans = [span for span in spans if span[0]["step"] not in twice and span[0]["step"] - span[1] not in validated] or spans
    sizes = [rate * seconds / steps for row, steps, seconds in spans for rate in numbers([row], "samples_per_second")]
    return round(statistics.median_low(sizes)) * round(max(numbers(rows, "step"))) if sizes else 0


def _wait(rows: list[Row]) -> float | None:
    """Share of the time, of lines that say it, that was spent waiting for data."""
    spans = [(share, seconds) for row, _, seconds in _spans(rows) for share in numbers([row], "data_wait")]
    total = sum(seconds for _, seconds in spans)
    return sum(share * seconds for share, seconds in spans) / total if total else None


def _images(rows: list[Row]) -> int:
    return len({str(row.get("image_id", row.get("source", row.get("image")))) for row in rows})
